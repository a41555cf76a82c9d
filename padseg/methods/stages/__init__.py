"""Steps that papers share, one per file. Names are listed in __init__.pyi and imported on first use: options can be read without torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
