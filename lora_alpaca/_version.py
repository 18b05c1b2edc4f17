"""The version, apart from the package, so that no module of it imports its root."""

__version__ = "0.1.0"
