"""Phase: how each parameter is sent while density and the dense switch do not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dgc.config import DGCConfig
from dgc.memory.slots import Slot

from .schedule import dense_is_cheaper


class Phase(NamedTuple):
    """A stretch of steps that all send the parameters in the same way."""

    density: float
    masking: bool
    """Whether the rule's momentum becomes 0 where an entry was sent."""
    dense: Mapping[str, str]
    """Parameters that are sent dense, with the reason; all others are compressed."""
    may_mask: bool
    """Whether the rule masks at any density, unless it is told otherwise."""
    dearer: str = ""
    """A note where what is compressed takes more bytes than it would dense; empty where it does not."""

    def describe(self, slots: Mapping[str, Slot]) -> str:
        """Returns one line for the log: what is compressed, what is dense and why."""
        numel = {name: slot.piece.whole for name, slot in slots.items()}
        total = sum(numel.values())
        share = sum(n for name, n in numel.items() if name not in self.dense) / total
        reasons = ", ".join(f"{count} ({reason})" for reason, count in Counter(self.dense.values()).items())
        compressed = len(numel) - len(self.dense)
        unmasked = ", momentum not masked" if self.may_mask and not self.masking else ""
        return (
            f"density {100 * self.density:.4g} %: {compressed} of {len(numel)} parameters compressed, "
            f"{100 * share:.2f} % of {total:,} elements{unmasked}; dense: {reasons or 'none'}{self.dearer}"
        )


def masks(config: DGCConfig, density: float, masked_below: float) -> bool:
    """Returns whether, at this density, the rule's momentum becomes 0 where an entry was sent."""
    return density < masked_below if config.momentum_masking == "auto" else config.momentum_masking


def compresses(
    density: float,
    config: DGCConfig,
    slots: Mapping[str, Slot],
    never_compressed: Mapping[str, str],
    *,
    rows: int,
    entry_bytes: float,
) -> bool:
    """Returns whether steps at a density compress a parameter, of this rank or of another; arguments as phase_at's."""
    return any(
        name not in never_compressed and not dense_is_cheaper(density, rows, _itemsize(slot, config), entry_bytes)
        for name, slot in slots.items()
    )


def _itemsize(slot: Slot, config: DGCConfig) -> int:
    """Returns the bytes of an element of a dense gradient on the wire."""
    return min(slot.dtype.itemsize, config.dense_wire_dtype.itemsize)


def phase_at(
    density: float,
    config: DGCConfig,
    slots: Mapping[str, Slot],
    never_compressed: Mapping[str, str],
    *,
    rows: int,
    entry_bytes: float,
    whole: str,
    divided: bool,
    masked_below: float,
) -> Phase:
    """Returns the phase of the steps at a density.

    Args:
        density: from the schedule.
        config: the user's.
        slots: of all trainable parameters, by name.
        never_compressed: those dense in every phase, with the reason.
        rows: payloads that are gathered.
        entry_bytes: bytes of an entry on the wire.
        whole: why all parameters are sent dense; empty where they are not.
        divided: whether the ranks of a node divide what is compressed. It is compressed at every density then, since no
            rank has all of the momentum that a dense step needs.
        masked_below: density below which the rule masks by default.
    """
    dense, dearer = {}, ""
    for name, slot in slots.items():
        itemsize = _itemsize(slot, config)
        if name in never_compressed:
            dense[name] = never_compressed[name]
        elif not slot.numel:
            dense[name] = "no elements on this rank"
        elif divided:
            if dense_is_cheaper(density, rows, itemsize, entry_bytes):
                dearer = f"; a dense all-reduce between {rows} nodes would take fewer bytes than this density"
        elif whole:
            dense[name] = whole
        elif density >= 1:
            dense[name] = "density 1"
        elif dense_is_cheaper(density, rows, itemsize, entry_bytes):
            dense[name] = f"all-reduce is cheaper at this density with {rows} ranks"
    return Phase(density, masks(config, density, masked_below), dense, masked_below > 0, dearer)
