"""The version, once: pyproject.toml reads it here, and ranks compare it."""

__version__ = "0.1.0"
