"""The empty stand-in for a DGCState in a copy of a model."""

from __future__ import annotations

from typing import Any


class EmptyCopyError(AttributeError, RuntimeError):
    """The error of using a deep copy of a DGCState; an AttributeError, so that hasattr() returns False."""


class Copy:
    """The empty result of copy.deepcopy() of a DGCState; its use raises EmptyCopyError."""

    def __getattr__(self, name: str) -> Any:
        """Says what to copy instead.

        Raises:
            EmptyCopyError: always, but for names of Python's own.
            AttributeError: the name is Python's own: it begins with two underscores.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        raise EmptyCopyError(
            "DGCState: expected the state itself, got a copy.deepcopy() of it, which is left empty: it came with the "
            "copy of a model. To train the copy, make a DGCState of its parameters and register it; to keep momentum "
            "and residual, copy.deepcopy(state.state_dict())"
        )
