"""The package's version, for what is written down with a result."""

__all__ = ["__version__"]

__version__ = "0.1.0"
