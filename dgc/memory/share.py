"""Share: one rank's part of momentum and residual, and its division when a run continues on more or fewer ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from dgc import stats

from . import pieces
from .memory import Memory
from .weights import taken, weights

logger = logging.getLogger("dgc")

VERSION = 2
"""Version of state_dict(). Version 1 was one rank's share, without the rank as its key and without density."""
MOST_RANKS = 2**20
"""Largest number of ranks that a state_dict may give. A damaged one could give any, and loops run over all ranks."""


@dataclass(frozen=True)
class Share:
    """The description of a rank's share of momentum and residual, and of the state of the run."""

    rank: int
    """Number of the share: the rank, where each rank has one of its own."""
    world_size: int
    """Number of shares in the group that accumulated it."""
    step: int
    dense: bool
    diverged: list[str]
    """Parameters whose momentum differs between ranks, and so is a share too. All other momentum is equal."""
    kinds: list[str]
    """Kinds of the rule's tensors that come with the residual, such as "momentum"."""
    density: float | None = None
    """Density that DGCState.set_density() has set; None for DGCConfig's."""
    place: int = 0
    """Number of this part of the share, where the ranks of a node hold the model together."""
    places: int = 1
    """Number of parts of each share."""
    entries: list[int] = field(default_factory=list)
    """k of each parameter that may be compressed, in their order, where DGCConfig.selection is "global"; else empty.
    Equal on all ranks that hold the same part."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    """The fields of each Choice that DGCConfig.exchange "auto" has made."""

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Share:
        """Reads the plain values of a state_dict.

        Raises:
            ValueError: a value is missing or wrong; the message names it.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict: expected that of a DGCState, got {type(state_dict).__name__}")
        names = {"rank", "world_size", "step", "dense", "diverged", "momentum", "residual"}
        if missing := sorted(names - state_dict.keys()):
            raise ValueError(f"state_dict: expected a DGCState's, but {', '.join(missing)} is missing")

        def check(key: str, good: bool, expected: str) -> Any:
            if not good:
                raise ValueError(f"state_dict[{key!r}]: expected {expected}, got {state_dict[key]!r:.100}")
            return state_dict[key]

        def number(key: str, low: int, below: int, expected: str) -> int:
            value = state_dict[key]
            return int(check(key, type(value) is int and low <= value < below, expected))

        world_size = number("world_size", 1, MOST_RANKS + 1, f"a number of ranks up to {MOST_RANKS}")
        check("momentum", isinstance(state_dict["momentum"], Mapping), "tensors by parameter name")
        dense, diverged, density = state_dict["dense"], state_dict["diverged"], state_dict.get("density")
        good = density is None or (type(density) is float and 0 < density <= 1)
        # Earlier versions saved no kinds, but momentum alone, or an empty dict in its place.
        kinds = state_dict.get("kinds", ["momentum"] if state_dict["momentum"] else [])
        if not _strings(kinds) or not all(isinstance(state_dict.get(kind), Mapping) for kind in kinds):
            raise ValueError(f"state_dict['kinds']: expected names of tensors that are there, got {kinds!r:.100}")
        return cls(
            number("rank", 0, world_size, f"a rank of {world_size}"),
            world_size,
            number("step", 0, 2**62, "a number of steps"),
            bool(check("dense", type(dense) is bool, "True or False")),
            list(check("diverged", _strings(diverged), "a list of parameter names")),
            [kind for kind in kinds if state_dict[kind]],
            None if density is None else float(check("density", good, "None or a number in (0, 1]")),
            *_place(state_dict),
            _entries(state_dict),
            _choices(state_dict.get("choices", [])),
        )


def _place(state_dict: Mapping[str, Any]) -> tuple[int, int]:
    """Reads place and places, which are 0 and 1 where a rank holds the whole model."""
    place, places = state_dict.get("place", 0), state_dict.get("places", 1)
    if not (type(place) is type(places) is int and 0 <= place < places <= MOST_RANKS):
        raise ValueError(f"state_dict['place']: expected one of {places!r:.20} places, got {place!r:.20}")
    pieces.check(state_dict.get("pieces", {}))
    return place, places


def _entries(state_dict: Mapping[str, Any]) -> list[int]:
    """Reads the k's, which earlier versions did not save."""
    ks = state_dict.get("entries", [])
    if not (isinstance(ks, (list, tuple)) and all(type(k) is int and 0 <= k < 2**47 for k in ks)):
        raise ValueError(f"state_dict['entries']: expected a number of entries for each parameter, got {ks!r:.100}")
    return list(ks)


def _choices(saved: object) -> list[dict[str, Any]]:
    if not isinstance(saved, (list, tuple)):
        raise ValueError(f"state_dict['choices']: expected a list, got {saved!r:.100}")
    return [asdict(stats.Choice.of(one)) for one in saved]


def _strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is str for one in value)


def differences(shares: Mapping[str, Share]) -> str:
    """Returns a text on how shares differ in their group or step; empty where they agree.

    Args:
        shares: by their names in the text.
    """
    shares = dict(zip(shares, united([*shares.values()]), strict=True))
    one = next(iter(shares.values()))
    first = {share.place: share for share in reversed(shares.values())}  # parts have entries of their own
    if all(
        replace(share, rank=one.rank, place=one.place, entries=one.entries) == one
        and share.entries == first[share.place].entries
        for share in shares.values()
    ):
        return ""
    return "; ".join(
        f"{what} was rank {share.rank} of {share.world_size} at step {share.step}" for what, share in shares.items()
    )


def united(shares: Sequence[Share]) -> list[Share]:
    """Returns the shares with all diverged parameters of their parts: one that has no rows of a parameter has fewer."""
    everything = {share.rank: set[str]() for share in shares}
    for share in shares:
        everything[share.rank].update(share.diverged)
    return [replace(share, diverged=sorted(everything[share.rank])) for share in shares]


def wrap(ranks: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the shares of some ranks as a state_dict.

    The key of each share is its rank, and its place where ranks hold parts. torch.distributed.checkpoint keeps a single
    entry per key, so equal keys on all ranks would mix tensors of different ranks.
    """
    return {"version": VERSION, "ranks": {_key(share): dict(share) for share in ranks.values()}}


def _key(share: Mapping[str, Any]) -> str:
    rank = str(share.get("rank"))
    return rank if share.get("places", 1) == 1 else f"{rank}.{share.get('place')}"


def unwrap(state_dict: object) -> list[Mapping[str, Any]]:
    """Returns the shares that a state_dict holds.

    Raises:
        ValueError: it is not a DGCState's, or is of an unknown version.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict: expected that of a DGCState, got {type(state_dict).__name__}")
    if not state_dict:
        raise ValueError(
            "state_dict: expected that of a DGCState, got an empty one: full_state_dict() returns {} on all ranks but "
            "0. Have every rank read the file that rank 0 wrote"
        )
    if "version" not in state_dict:
        raise ValueError(
            f"state_dict: expected a DGCState's, with a version, got one of {', '.join(map(str, state_dict))}"
        )
    version = state_dict["version"]
    if type(version) is not int or version not in (1, VERSION):
        raise ValueError(f"state_dict['version']: expected 1 or {VERSION}, got {version!r:.100}")
    if version == 1:
        return [state_dict]
    ranks = state_dict.get("ranks")
    if not isinstance(ranks, Mapping):
        raise ValueError(f"state_dict['ranks']: expected shares by rank, got {ranks!r:.100}")
    for name, share in ranks.items():
        if isinstance(share, Mapping) and _key(share) != str(name):
            raise ValueError(f"state_dict['ranks'][{name!r}]: expected the share of that rank, got {_key(share):.100}")
    return list(ranks.values())


class Choice(NamedTuple):
    """The checked state_dicts that a rank takes over, with their weights."""

    share: Share
    """The share of any of the ranks, for the state of the run."""
    parts: list[tuple[float, Mapping[str, Any]]]
    """Weights and state_dicts, in the order of their ranks."""
    missing: list[int]
    """Ranks whose share this rank should take over, but whose state_dict is missing."""


def choose(
    memory: Memory,
    state_dicts: Sequence[Mapping[str, Any]],
    rank: int,
    world_size: int,
    allow_missing_ranks: bool = False,
) -> Choice:
    """Returns the part of a group's state_dicts that a rank takes over.

    Args:
        memory: this rank's, which the parts have to fit; it does not change.
        state_dicts: one of each rank, in any order; those that this rank takes nothing of may be left out.
        rank: this process's present rank.
        world_size: the present number of ranks.
        allow_missing_ranks: whether missing shares count as zero; else they are an error.

    Raises:
        ValueError: they do not fit each other or this model, one is damaged, or one is missing.
    """
    if not state_dicts:
        raise ValueError("state_dict: expected at least one, got none")
    shares = united([Share.of(state_dict) for state_dict in state_dicts])
    by_rank: dict[int, list[Mapping[str, Any]]] = {}
    for share, state_dict in zip(shares, state_dicts, strict=True):
        by_rank.setdefault(share.rank, []).append(state_dict)
    if len({(share.rank, share.place) for share in shares}) < len(shares):
        raise ValueError(
            f"state_dict: expected one of each rank, got those of rank {numbers([s.rank for s in shares])}. A residual "
            "belongs to one rank, and each rank saves its own: with torch.distributed.checkpoint, by "
            "dgc.checkpoint.save(state, dir)"
        )
    if differ := differences({f"state_dict {i}": share for i, share in enumerate(shares)}):
        raise ValueError(f"state_dict: expected those of one group at one step, but {differ}")
    one = shares[0]
    wanted = weights(rank, world_size, one.world_size)
    missing = sorted(wanted.keys() - by_rank.keys())
    if missing and not allow_missing_ranks:
        raise ValueError(
            f"state_dict: rank {rank} of {world_size} takes over the residual of rank {numbers(missing)} of "
            f"{one.world_size}, which is missing: expected its state_dict, got that of rank "
            f"{numbers(sorted(by_rank))}. Give each rank what it saved; on another number of ranks "
            "load_state_dict([...]) takes those of all ranks, and dgc.checkpoint finds them by itself. If the number "
            "of ranks is wrong, load after init_process_group(). To go on without what that rank had not sent: "
            "allow_missing_ranks=True"
        )
    there = taken(rank, world_size, one.world_size, by_rank)
    kinds = ["residual", *one.kinds]
    parts = [(wanted.get(s, 0.0), pieces.fitted(by_rank[s], kinds, memory.slots)) for s in there]
    memory.check([state_dict for _, state_dict in parts], one.kinds, one.diverged)
    return Choice(one, parts, missing)


def numbers(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 20} more" if len(ranks) > 20 else ""
    return ", ".join(map(str, ranks[:20])) + more


def log_lost(lost: Sequence[int], before: int) -> None:
    """Logs how much was lost with ranks that left."""
    logger.warning(
        "dgc: rank %s of %d left: what it had not sent is lost, %d/%d of all that waited",
        numbers(lost),
        before,
        len(lost),
        before,
    )
