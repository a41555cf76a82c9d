"""The version of padseg."""

__version__ = '0.1.0'
