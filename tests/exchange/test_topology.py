"""An exchange that sums pairs of ranks first: four ranks train as two that have the pairs' mean gradients."""

import pytest
import torch
import torch.distributed as dist

import dgc
from dgc.exchange.base import Exchange, Topology
from dgc.exchange.distributed import DistributedTransfer
from support.ddp_run import Run
from support.models import integers
from support.ranks import run_ranks
from support.training import SHAPES, seed_of

SGD = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}


class Pairs(Exchange):
    """Ranks 2i and 2i+1 share a payload; between pairs there are two groups, of even ranks and of odd ones."""

    def __init__(self):
        ranks = range(dist.get_world_size())
        inner = [dist.new_group([r, r + 1]) for r in ranks[::2]]
        outer = [dist.new_group(list(ranks[i::2])) for i in range(2)]
        self.refresh()
        self.inner, self.outer = inner[self.rank // 2], outer[self.rank % 2]

    def refresh(self):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def topology(self):
        pair, pairs = self.rank // 2, self.world_size // 2
        return Topology(
            rank=self.rank,
            ranks=self.world_size,
            row=pair,
            rows=pairs,
            averaged=self.world_size,
            workers=pairs,
            share=pair,
            shares=pairs,
        )

    def gather_in(self, buffers):
        for buffer in buffers:
            dist.all_reduce(buffer, group=self.inner)
            buffer /= 2

    def start(self, name, payload, gathered, dense):
        works = []
        if payload is not None:
            rows = list(gathered.unbind())
            works.append(dist.all_gather(rows, payload, group=self.outer, async_op=True))
        if dense is not None:
            dense /= self.topology.rows
            works.append(dist.all_reduce(dense, group=self.outer, async_op=True))
        return DistributedTransfer(works, None)

    def everyone(self, text):
        texts = [""] * self.world_size
        dist.all_gather_object(texts, text)
        return texts

    def broadcast(self, tensors, root):
        for tensor in tensors:
            dist.broadcast(tensor, root)


def pair_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Returns the mean of a pair's gradients: halves of integers, exact in any order."""
    one, other = (integers(SHAPES, seed_of(step, r)) for r in (2 * rank, 2 * rank + 1))
    return {name: (one[name] + other[name]) / 2 for name in SHAPES}


def in_pairs(rank, world_size, config):
    run = Run(config, state={"exchange": Pairs()}, **SGD)
    for step in range(8):
        run.train(integers(SHAPES, seed_of(step, rank)))
    return run.result(), run.state.full_state_dict(), run.state.stats


def as_two(rank, world_size, config):
    run = Run(config, **SGD)
    for step in range(8):
        run.train(pair_of(rank, step))
    return run.result(), run.state.full_state_dict(), run.state.stats


@pytest.mark.parametrize("clip_norm", [None, 20.0])
def test_four_ranks_in_pairs_are_two_with_the_pairs_gradients(clip_norm):
    config = dgc.DGCConfig(density=0.008, clip_norm=clip_norm, warmup_steps=3, warmup_densities=(0.25,))
    four, two = run_ranks(4, in_pairs, config), run_ranks(2, as_two, config)
    for rank, (result, _, stats) in enumerate(four):
        expected, _, their_stats = two[rank // 2]
        for kind in ("parameters", "residual", "momentum"):
            for name, tensor in expected[kind].items():
                assert torch.equal(result[kind][name], tensor), (rank, kind, name)
        assert stats == their_stats  # bytes between pairs, break-even by pairs
    full, theirs = four[0][1], two[0][1]
    assert list(full["ranks"]) == list(theirs["ranks"]) == ["0", "1"]
    for share in ("0", "1"):
        assert full["ranks"][share]["world_size"] == 2
        for name, tensor in theirs["ranks"][share]["residual"].items():
            assert torch.equal(full["ranks"][share]["residual"][name], tensor)


def goes_on(rank, world_size, full):
    run = Run(dgc.DGCConfig(density=0.008), **SGD)
    run.state.load_state_dict(full)
    return {name: v.clone() for name, v in run.state.state_dict()["ranks"][str(rank)]["residual"].items()}


def test_what_pairs_saved_loads_on_ranks_without_pairs():
    full = run_ranks(4, in_pairs, dgc.DGCConfig(density=0.008))[0][1]
    for rank, residual in enumerate(run_ranks(2, goes_on, full)):
        for name, tensor in residual.items():
            assert torch.equal(tensor, full["ranks"][str(rank)]["residual"][name])


def test_every_number_of_a_flat_topology_is_the_rank_or_the_world_size():
    assert set(Topology.flat(2, 5)) == {2, 5}
    assert [name for name, n in Topology.flat(2, 5)._asdict().items() if n == 2] == ["rank", "row", "share"]
