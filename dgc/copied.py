"""What stands in for a DGCState in a copy of a model."""

from __future__ import annotations

from typing import Any


class EmptyCopyError(AttributeError, RuntimeError):
    """A copy of a DGCState was used. An AttributeError, so that hasattr() is answered with False."""


class Copy:
    """What a copy.deepcopy() of a DGCState is: nothing, and an error for who uses it."""

    def __getattr__(self, name: str) -> Any:
        """Says what to copy instead.

        Raises:
            EmptyCopyError: always; AttributeError for names of Python's own.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        raise EmptyCopyError(
            "DGCState: expected the state itself, got a copy.deepcopy() of it, which is left empty: it came with the "
            "copy of a model. To train the copy, make a DGCState of its parameters and register it; to keep momentum "
            "and residual, copy.deepcopy(state.state_dict())"
        )
