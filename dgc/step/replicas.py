"""Replicas compared while the run goes on: a digest of each parameter, and of the settings that must be equal.

They travel in a small all-gather of their own, beside the payloads and not in their headers. So the first parameter
that differs can be named without a second exchange, and passes in which all is dense, without payloads, are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.futures import Future
from torch.profiler import record_function

from dgc.exchange.base import Exchange, Transfer
from dgc.local import local
from dgc.ops.wire import PayloadError

from .standing import Standing

COLUMNS = 4096
"""Words whose weights differ."""
CHUNK = 256 * COLUMNS
"""Words that are summed at once. On the CPU torch.sum() makes an int64 copy of them, 8 MiB."""
_INTEGERS = {1: torch.int8, 2: torch.int16}


def digest(tensor: Tensor) -> Tensor:
    """Returns 64 bits that depend on every bit of a tensor, in one pass over its memory, on its device.

    The tensor's bits are read as integers of at most 32 bits, in rows of COLUMNS; columns are added up modulo 2^64, and
    the sums added with an odd weight each. A change of one word always changes the digest, and one of any number of
    words of a row that differ, unless 64 bits collide. Changes in the same column of a chunk of 256 rows are not found
    where they add up to zero, such as two rows in the place of each other.

    Args:
        tensor: plain, of any type and strides.

    Returns:
        int64, a scalar. The host does not wait for it.
    """
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(_INTEGERS.get(flat.element_size(), torch.int32))
    columns = torch.zeros(COLUMNS, dtype=torch.int64, device=words.device)
    for chunk in words.split(CHUNK):
        rows = len(chunk) // COLUMNS
        columns *= _MIX  # tells chunks apart
        columns += chunk[: rows * COLUMNS].view(rows, COLUMNS).sum(0, dtype=torch.int64)
        rest = chunk[rows * COLUMNS :]
        columns[: len(rest)] += rest
    return (columns * _weights(words.device)).sum()


_MIX = -0x61C8864680B583EB
"""2^64 over the golden ratio, as int64; odd, so that a multiplication loses nothing."""


@cache
def _weights(device: torch.device) -> Tensor:
    """Returns COLUMNS odd numbers without a pattern, int64."""
    x = torch.arange(1, COLUMNS + 1, dtype=torch.int64) * _MIX
    for shift in (30, 27, 31):  # as SplitMix64 does, whose shifts fill with zeros
        x = (x ^ (x >> shift)) * _MIX
    return (x | 1).to(device)


def hash_of(text: str) -> int:
    """Returns 63 bits of a text's hash, equal on all ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def words_of(
    step: int,
    phase: str,
    groups: Iterable[Mapping[str, object]],
    parameters: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[list[str], Tensor]:
    """Returns the names of what has to be equal on all ranks, and a digest of each.

    Args:
        step: of the pass, above 0.
        phase: a text with all that decides what is sent.
        groups: the optimizer's.
        parameters: by name; of DTensors, this rank's part counts.
        device: of the parameters.

    Returns:
        The names, and int64 [names]. The first is the step.
    """
    known = {"step": step, "density phase": hash_of(phase)}
    tensors: dict[str, Tensor] = {}
    for i, group in enumerate(groups):
        plain = {key: value for key, value in group.items() if isinstance(value, (bool, int, float, str, tuple))}
        known[f"optimizer settings of group {i}"] = hash_of(repr(sorted(plain.items())))
        on_device = {key: value for key, value in group.items() if isinstance(value, Tensor)}
        tensors.update({f"{key} of group {i}": value.to(device) for key, value in on_device.items()})
    tensors.update({f"value of the parameter {name}": local(p) for name, p in parameters.items()})
    digests = torch.stack([digest(tensor) for tensor in tensors.values()])
    return [*known, *tensors], torch.cat([torch.tensor(list(known.values())).to(device), digests])


class Replicas:
    """One comparison of all ranks.

    Attributes:
        report: int32 [2 + rows], all zeros where ranks are equal. Else how many names differ, the first of them, and of
            each rank the first one that has the same digest of it, -1 for one that takes no part.
    """

    def __init__(self, step: int, names: Sequence[str], mine: Tensor, exchange: Exchange) -> None:
        """Starts the all-gather of the digests; a collective.

        Args:
            step: for the message.
            names: of the digests.
            mine: int64 [names]; zeros where this rank takes no part.
            exchange: the collectives.
        """
        rows, places = exchange.topology.rows, exchange.topology.places
        self._step, self._names, self._who = step, names, "node" if places > 1 else "rank"
        self._mine = mine.view(torch.uint8)
        self._gathered = self._mine.new_empty(rows, len(self._mine))
        self.report = torch.zeros(2 + rows, dtype=torch.int32, device=mine.device)
        self.future: Future[Tensor] = exchange.future()
        transfer = exchange.start("digests of replicas", self._mine, self._gathered, None)
        transfer.done.add_done_callback(partial(_receive, [(self, transfer)]))

    def receive(self) -> None:
        """Compares the digests, once they are there; the host does not wait for the device."""
        everyone = self._gathered.view(torch.int64)
        takes_part = everyone[:, 0] != 0
        first = everyone.index_select(0, takes_part.to(torch.int32).argmax().view(1))
        differ = ((everyone != first) & takes_part[:, None]).any(0)
        at = differ.to(torch.int32).argmax().view(1)
        column = everyone.index_select(1, at).view(-1)
        like = torch.where(takes_part, (column[:, None] == column).to(torch.int32).argmax(1), -1)
        self.report.copy_(torch.cat([differ.sum().view(1), at, like]) * differ.any())

    def findings(self, report: Sequence[int]) -> set[str]:
        """Returns nothing, where the ranks are equal.

        Args:
            report: on the host.

        Raises:
            PayloadError: they are not; the message names the ranks and the first name.
        """
        count, at, *like = report
        if not count:
            return set()
        camps: dict[int, list[int]] = {}
        for rank, first in enumerate(like):
            camps.setdefault(first, []).append(rank)
        camps.pop(-1, None)
        most, *others = sorted(camps.values(), key=len, reverse=True)
        alone = sorted(rank for camp in others for rank in camp)

        def listed(ranks: list[int]) -> str:
            return ", ".join(map(str, ranks[:5])) + (", ..." if len(ranks) > 5 else "")

        doubt = "" if len(most) > len(alone) else " Which of them is right cannot be told."
        raise PayloadError(
            f"replicas differ at step {self._step}: {self._who} {listed(alone)} has another {self._names[at]} than "
            f"{self._who} {listed(most)} (the first of {count} that differ).{doubt} Nothing of this step was applied. "
            "Restart all ranks from a checkpoint from before; or, on all ranks, call "
            "state.discard(drop_gradient=False), dist.broadcast() parameters and optimizer state from one that is "
            "right, and go on"
        )


def compare(standing: Standing, shadow: bool) -> Replicas | None:
    """Starts a comparison where this step has one (DGCConfig.check_every); a collective, before the first bucket.

    Args:
        standing: of the run.
        shadow: whether this rank has run out of data (DDP's join()), so that its parameters stay behind.
    """
    step, every, exchange = standing.step, standing.config.check_every, standing.exchange
    if not every or not step or step % every or exchange.topology.rows == 1:
        return None
    with record_function("dgc.replicas"):
        parameters, phase = standing.parameters, standing.layouts.phase
        what = repr((phase.density, phase.masking, sorted(phase.dense.items()), standing.dense))
        groups = parameters.optimizer.param_groups
        names, mine = words_of(step, what, groups, parameters.by_name, parameters.device)
        return Replicas(step, names, torch.zeros_like(mine) if shadow else mine, exchange)


def _receive(arrivals: list[tuple[Replicas, Transfer]], _: object) -> None:
    """Compares, and completes the future; on the backend's thread, as the function of that name in reducer.py."""
    replicas, transfer = arrivals.pop()
    future, report = replicas.future, replicas.report
    try:
        with transfer.arrived():
            replicas.receive()
            del replicas
            future.set_result(report)
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong
