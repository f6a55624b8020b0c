"""Optimizers, which apply the reduced gradients: dgc.SGD, and an interface for any other torch optimizer."""

from .sgd import SGD

__all__ = ["SGD"]
