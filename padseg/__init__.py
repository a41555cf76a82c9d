"""Mask proposals from the pad-token attention of diffusion transformers. The public names stand in __init__.pyi."""

import lazy_loader

# each name is imported when it is used: none is needed for `padseg --help`, and torch takes seconds
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
