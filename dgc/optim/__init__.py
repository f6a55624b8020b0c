"""Optimizers, which apply the reduced gradients: dgc.SGD, dgc.AdamW, dgc.Adam, and an interface for any other."""

from .adamw import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
