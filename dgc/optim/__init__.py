"""What applies the result: dgc.SGD, and any torch optimizer behind the same face."""

from .sgd import SGD

__all__ = ["SGD"]
