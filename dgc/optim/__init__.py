"""Optimizers, which apply the reduced gradients: dgc.SGD, dgc.AdamW, dgc.Adam, dgc.OuterSGD; and any other."""

from .adamw import Adam, AdamW
from .outer import OuterSGD
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "OuterSGD"]
