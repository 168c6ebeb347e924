"""The version of this package, which importing nothing else tells."""

__version__ = "0.1.0"
