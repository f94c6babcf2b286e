"""The command ``qstar``."""

from .app import main

__all__ = ["main"]
