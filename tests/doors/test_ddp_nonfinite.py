"""Gradients that are not finite, on one of several ranks: nothing is lost, at once or late."""

import pytest
import torch

import dgc
from support.ddp_run import Run
from support.models import integers
from support.ranks import run_ranks
from support.training import (
    LARGE,
    SHAPES,
    assert_conserved,
    seed_of,
)


def poison(rank, world_size, bucket_name, on_nonfinite, late=False):
    run = Run(dgc.DGCConfig(density=0.008, on_nonfinite=on_nonfinite), momentum=0.0, lr=0.25, state={"late": late})
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    raised = 0
    for step in range(12):
        g = integers(SHAPES, seed_of(step, rank))
        for n in LARGE:
            total[n] += g[n]
        if rank == 1 and step in (3, 4):
            g[bucket_name].view(-1)[7] = float("nan")
            if bucket_name in LARGE:
                total[bucket_name].view(-1)[7] -= integers(SHAPES, seed_of(step, rank))[bucket_name].view(-1)[7]
        try:
            run.train(g)
        except FloatingPointError:
            raised += 1
    return {**run.result(), "total": total, "raised": raised}


@pytest.mark.parametrize("bucket_name", ["a", "c", "e", "b"])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_non_finite_gradients_anywhere_lose_nothing(bucket_name, on_nonfinite):
    results = run_ranks(2, poison, bucket_name, on_nonfinite)
    assert_conserved(results)
    assert [r["raised"] for r in results] == [2 * (on_nonfinite == "raise")] * 2
    assert [r["stats"].skipped for r in results] == [2, 2]
    assert [r["step"] for r in results] == [10, 10]


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_verdict_that_comes_late_leaves_ddp_in_working_order(on_nonfinite):
    results = run_ranks(2, poison, "c", on_nonfinite, True)
    assert_conserved(results)
    # Of two bad steps in a row, the error of the first takes the second along.
    assert [r["raised"] for r in results] == [on_nonfinite == "raise"] * 2
    assert [(r["step"], r["stats"].skipped) for r in results] == [(10, 2)] * 2
