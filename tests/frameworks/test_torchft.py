"""dgc.torchft: a step that the manager does not commit goes the way of a skipped one, on the real OptimizerWrapper."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.messages import error_of
from support.models import Given, integers
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_conserved, outcome, seed_of

pytest.importorskip("torchft", reason="NOT TESTED: dgc.torchft, since torchft is not installed: '.[torchft]'")

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,))
NOT_COMMITTED = {2, 5}


class Manager:
    """The part of torchft.Manager that its OptimizerWrapper uses, by its documentation."""

    def __init__(self):
        self.step = -1

    def start_quorum(self):
        self.step += 1

    def should_commit(self):
        return self.step not in NOT_COMMITTED


def run(rank, world_size, name):
    import torchft.optim

    import dgc.torchft

    wrapper = {"ours": dgc.torchft, "theirs": torchft.optim}[name].OptimizerWrapper
    net = Given(SHAPES)
    model = DistributedDataParallel(net)
    optimizer = wrapper(Manager(), torch.optim.SGD(net.parameters(), lr=0.125))
    assert dgc.attach(model, optimizer, CONFIG) is optimizer
    assert type(optimizer.optim) is dgc.SGD  # looked into, and converted
    total = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    error = ""
    for step in range(8):
        optimizer.zero_grad()
        gradients = integers(SHAPES, seed_of(step, rank))
        error = error or error_of(lambda gradients=gradients: model(gradients).backward())
        if error:
            return error
        optimizer.step()
        for n in LARGE:
            total[n] += gradients[n]
    return {**outcome(net, optimizer.dgc), "total": total, "closure": error_of(lambda: optimizer.step(lambda: None))}


def test_a_step_that_is_not_committed_loses_nothing():
    results = run_ranks(2, run, "ours")
    assert_conserved(results, factor=16)  # two ranks, lr = 1/8
    for r in results:
        assert r["step"] == 8 - len(NOT_COMMITTED)
        assert "expected no closure" in r["closure"]


def test_torchft_s_own_wrapper_is_an_error_at_the_next_pass_and_not_a_silent_loss():
    for error in run_ranks(2, run, "theirs"):
        assert "expected optimizer.step() after the last backward pass" in error
