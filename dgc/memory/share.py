"""Share: one rank's part of what waits, and whose it becomes when a run goes on with more ranks, or fewer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .memory import Memory

logger = logging.getLogger("dgc")

VERSION = 2
"""Of state_dict(). Version 1 was one rank's share without the rank's name around it, and without density."""
MOST_RANKS = 2**20
"""The largest group whose shares are taken over: a damaged file may name any number, and it is counted to."""


@dataclass(frozen=True)
class Share:
    """Whose share of momentum and residual a memory holds, and where the run stands."""

    rank: int
    """Which of the shares it is: the rank, where each rank has one of its own."""
    world_size: int
    """Shares in all, of the group in which it was accumulated."""
    step: int
    dense: bool
    diverged: list[str]
    """Parameters whose momentum is a share too; that of the others is the same on all ranks."""
    kinds: list[str]
    """Kinds of tensors besides the residual that there are: "momentum", or what the optimizer's rule keeps."""
    density: float | None = None
    """What DGCState.set_density() has set; None for DGCConfig's."""

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Share:
        """Reads the plain values of a state_dict.

        Raises:
            ValueError: one is missing, or is not what it should be; the message names it.
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
        # Before kinds had names there was momentum alone, or an empty dict in its place.
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
        )


def _strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is str for one in value)


def differences(shares: Mapping[str, Share]) -> str:
    """Returns how shares that should be of one group at one step differ; nothing where they do not.

    Args:
        shares: by what the message calls them.
    """
    one = next(iter(shares.values()))
    if all({**asdict(share), "rank": one.rank} == asdict(one) for share in shares.values()):
        return ""
    return "; ".join(
        f"{what} was rank {share.rank} of {share.world_size} at step {share.step}" for what, share in shares.items()
    )


def wrap(ranks: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the shares of some ranks as a state_dict.

    Under the ranks' names, since torch.distributed.checkpoint keeps only one of the entries that ranks have by equal
    names: so of each tensor one rank's, and perhaps of the next another's.
    """
    return {"version": VERSION, "ranks": {str(rank): dict(share) for rank, share in ranks.items()}}


def unwrap(state_dict: object) -> list[Mapping[str, Any]]:
    """Returns the shares that a state_dict holds.

    Raises:
        ValueError: it is none of a DGCState's, or of a later version.
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
        if isinstance(share, Mapping) and str(share.get("rank")) != str(name):
            raise ValueError(
                f"state_dict['ranks'][{name!r}]: expected the share of that rank, got {share.get('rank')!r:.100}"
            )
    return list(ranks.values())


def weights(rank: int, world_size: int, before: int) -> dict[int, float]:
    """Returns what a rank takes over of the shares of a group of another size; docs/reliability.md has the proof.

    All ranks' shares lie side by side on a line, once in pieces of the old group and once in pieces of the new one:
    rank r of N gets (N/M) * |[rM/N, (r+1)M/N) intersected with [s, s+1)| of share s of M. Each rank's weights add up
    to 1 and each share's to N/M, so the mean over the ranks stays the same. With N = M each rank gets its own.

    Args:
        rank: r.
        world_size: N.
        before: M.

    Returns:
        Weights by s, without those that are 0.
    """
    begin, end = rank * before, (rank + 1) * before
    pieces = range(begin // world_size, -(-end // world_size))
    return {s: (min(end, (s + 1) * world_size) - max(begin, s * world_size)) / before for s in pieces}


def taken(rank: int, world_size: int, before: int, there: Iterable[int]) -> list[int]:
    """Returns the shares that a rank reads, of those that are there, in their order.

    Args:
        rank: this process's share, now.
        world_size: number of shares, now.
        before: number of shares when they were saved.
        there: those that can be read.
    """
    wanted = weights(rank, world_size, before)
    # Where none is there, any one will do for the momentum that is the same on all ranks.
    return sorted(wanted.keys() & set(there)) or sorted(there)[:1]


class Choice(NamedTuple):
    """What a rank takes over of the state_dicts of a group, all of it checked."""

    share: Share
    """Where the run stood; of any of the ranks."""
    parts: list[tuple[float, Mapping[str, Any]]]
    """Weights and state_dicts, in the order of their ranks."""
    missing: list[int]
    """Ranks whose share this rank should get, and does not."""


def choose(
    memory: Memory,
    state_dicts: Sequence[Mapping[str, Any]],
    rank: int,
    world_size: int,
    allow_missing_ranks: bool = False,
) -> Choice:
    """Returns a rank's part of what the state_dicts hold.

    Args:
        memory: this rank's, which the parts have to fit; it does not change.
        state_dicts: one of each rank, in any order; those that this rank takes nothing of may be left out.
        rank: this process's, now.
        world_size: number of ranks, now.
        allow_missing_ranks: whether the shares that this rank should get may be missing: they count as zero then.

    Raises:
        ValueError: they do not fit each other or this model, one is damaged, or one is missing.
    """
    if not state_dicts:
        raise ValueError("state_dict: expected at least one, got none")
    shares = [Share.of(state_dict) for state_dict in state_dicts]
    by_rank = {share.rank: state_dict for share, state_dict in zip(shares, state_dicts, strict=True)}
    if len(by_rank) < len(shares):
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
    parts = [(wanted.get(s, 0.0), by_rank[s]) for s in taken(rank, world_size, one.world_size, by_rank)]
    memory.check([state_dict for _, state_dict in parts], one.kinds, one.diverged)
    return Choice(one, parts, missing)


def numbers(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 20} more" if len(ranks) > 20 else ""
    return ", ".join(map(str, ranks[:20])) + more


def log_lost(lost: Sequence[int], before: int) -> None:
    """Says what has gone with ranks that left."""
    logger.warning(
        "dgc: rank %s of %d left: what it had not sent is lost, %d/%d of all that waited",
        numbers(lost),
        before,
        len(lost),
        before,
    )
