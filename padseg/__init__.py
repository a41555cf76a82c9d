"""Mask proposals from the pad-token attention of diffusion transformers. __init__.pyi lists the public names."""

import lazy_loader

# Names are imported on first use: `padseg --help` needs none of them, and importing torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
