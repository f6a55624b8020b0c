"""Ages: how long entries wait before they are sent, by a sample of them."""

from __future__ import annotations

import torch
from torch import Tensor

EVERY = 100
"""Steps whose sent entries make one figure."""


class Ages:
    """The step at which each entry of a sample was last sent, and how long those sent since the last figure waited.

    The age of an entry that is sent is the number of steps whose gradients it sums: 1 did not wait. An entry that has
    not been sent since the watch began is as old as the watch. The sample is every stride-th element of memory, and a
    step costs as much as was sent, whatever the size of the sample.
    """

    def __init__(self, numel: int, sample: int, step: int, device: torch.device) -> None:
        """Begins to watch.

        Args:
            numel: elements of memory.
            sample: the number of them to watch, about.
            step: number of the next step.
            device: of memory.
        """
        self.sample = sample
        # Odd, so that the sample does not stay in a few columns of a matrix.
        self._stride = max(1, numel // sample) | 1
        self._size = -(-numel // self._stride)
        # One more than the sample, for what is not in it: a mask would make a GPU's host wait.
        self._last = torch.full((self._size + 1,), step, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.int64, device=device)  # ages, and how many
        self.figure: float | None = None
        """Mean age of what was sent in the last full round of steps; None before the first, or where nothing was."""

    def note(self, chosen: Tensor, step: int) -> None:
        """Notes what is sent.

        Args:
            chosen: int64 [entries], elements of memory.
            step: number of the step.
        """
        sampled = chosen % self._stride == 0
        where = torch.where(sampled, chosen // self._stride, self._size)
        ages = torch.where(sampled, step + 1 - self._last[where], 0)
        self._sums += torch.stack([ages.sum(), sampled.sum()])
        self._last[where] = step + 1

    def end(self, steps: int) -> None:
        """Ends a step; at the end of a round it takes the figure, for which a GPU is waited for.

        Args:
            steps: taken so far.
        """
        if steps % EVERY == 0:
            total, count = self._sums.tolist()
            self.figure = total / count if count else None
            self._sums.zero_()
