"""What papers share, one step a file. The names stand in __init__.pyi and are imported when used: options can be read without torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
