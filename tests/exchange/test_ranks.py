"""Ranks that differ, are at another step, fall behind or die; and a process group of some of them."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ddp_run import Run
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    oracle_for,
    seed_of,
)


def differ(rank, world_size, what):
    net = Given(SHAPES)
    named = list(net.named_parameters())
    config = dgc.DGCConfig()
    if rank == 1 and what == "density":
        config = dgc.DGCConfig(density=0.008)
    if rank == 1 and what == "parameter c":
        net.c = nn.Parameter(torch.zeros(130, 131))
        named = list(net.named_parameters())
    if rank == 1 and what == "number of parameters":
        net.b.requires_grad_(False)
    optimizer = dgc.SGD(net.parameters(), lr=0.1, momentum=0.8 if rank == 1 and what == "(momentum" else 0.9)
    try:
        scaler = GradScaler("cpu") if rank == 1 and what == "loss scaling" else None
        if rank == 1 and what == "dgc: ":
            for name, module in list(sys.modules.items()):  # wherever it has been imported to
                if name.split(".")[0] == "dgc" and hasattr(module, "__version__"):
                    module.__version__ = "0.0.9"
        dgc.DGCState(named, optimizer, config, grad_scaler=scaler, process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "what", ["density", "parameter c", "number of parameters", "(momentum", "loss scaling", "dgc: "]
)
def test_ranks_that_differ_are_found_at_the_start(what):
    for message in run_ranks(3, differ, what, timeout=20):
        assert "rank 1 has" in message
        assert what in message
        assert "rank 2" not in message


def skip_a_step(rank, world_size):
    run = Run(shapes={"a": (200, 100)})
    for step in range(3):
        run.train(normals({"a": (200, 100)}, step))
    before = run.net.a.detach().clone()
    if rank == 1:
        run.state._standing.step += 1  # as if it had run one more backward pass than the others
    try:
        run.train(normals({"a": (200, 100)}, 9))
    except RuntimeError as error:
        run.state.discard(drop_gradient=False)
        return str(error), torch.equal(before, run.net.a.detach()), run.state.memory.residual_of("a").count_nonzero()
    return "no error"


def test_a_rank_at_another_step_is_named_and_nothing_is_applied():
    for rank, (message, unchanged, waiting) in enumerate(run_ranks(2, skip_a_step)):
        assert f"payload of rank {1 - rank}: it is at another step" in message
        assert "Steps by rank: [3, 4]" in message
        assert unchanged
        assert int(waiting) == 20_000  # what was sent is back


def fall_behind(rank, world_size, where, folder):
    """Rank 1 leaves out a backward pass, or its DGCState, and does something else for longer than the timeout."""
    run = Run()
    begin, outcome = time.monotonic(), "no error"
    try:
        while rank == 1 and not Path(folder, "outcome0.pt").exists() and time.monotonic() < begin + 8:
            time.sleep(0.1)
        if where == "backward":
            run.train(normals(SHAPES, rank))
        else:
            dgc.DGCState(run.net.named_parameters(), run.optimizer, process_group=dist.group.WORLD)
    except RuntimeError as error:
        outcome = str(error)
    torch.save((outcome, time.monotonic() - begin), f"{folder}/outcome{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("where", ["backward", "DGCState"])
def test_a_rank_that_leaves_out_a_pass_is_an_error_within_the_timeout(where, tmp_path):
    with pytest.raises(Exception, match=r"No such file"):
        run_ranks(2, fall_behind, where, str(tmp_path), timeout=3)
    outcome, seconds = torch.load(tmp_path / "outcome0.pt")
    what = "the exchange of gradients" if where == "backward" else "the comparison of the ranks"
    assert f"dgc: {what} failed, since a rank has gone, hangs, or has run fewer backward passes" in outcome
    assert 2 < seconds < 7.5


def die(rank, world_size, folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent as soon as the other rank is found dead
    run = Run()
    for step in range(3):
        run.train(normals(SHAPES, seed_of(step, rank)))
    if rank == 1:
        hook = run.state.reduce

        def die_at_the_second_bucket(gradients):
            if run.state._pass.reduced:
                os.kill(os.getpid(), signal.SIGKILL)
            return hook(gradients)

        run.state.reduce = die_at_the_second_bucket
    begin = time.monotonic()
    try:
        run.train(normals(SHAPES, rank))
        outcome = "no error"
    except RuntimeError as error:
        outcome = str(error)
    torch.save((outcome, time.monotonic() - begin), f"{folder}/outcome{rank}.pt")
    os._exit(0)  # the group cannot be taken down in order any more


def test_a_peer_that_dies_in_the_middle_of_a_step_is_an_error_not_a_hang(tmp_path):
    with pytest.raises(Exception, match=r"process 1|SIGKILL|No such file"):
        run_ranks(2, die, str(tmp_path), timeout=20)
    deadline = time.monotonic() + 30
    while not (tmp_path / "outcome0.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    outcome, seconds = torch.load(tmp_path / "outcome0.pt")
    assert "the exchange of gradients failed, since a rank has gone" in outcome
    assert "INTERNAL ASSERT" not in outcome
    assert seconds < 25  # within the group's timeout


def subgroup(rank, world_size):
    group = dist.new_group([0, 1])
    if rank == 2:
        return None
    net = Given(SHAPES)
    ddp = DistributedDataParallel(net, process_group=group)
    optimizer = dgc.SGD(ddp.parameters(), lr=0.5)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008), process_group=group)
    ddp.register_comm_hook(state, dgc.dgc_hook)
    for step in range(10):
        optimizer.zero_grad()
        ddp(integers(SHAPES, seed_of(step, rank))).backward()
        optimizer.step()
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    residual = {n: state.memory.residual_of(n) for n in LARGE}
    return {"parameters": parameters, "residual": residual, "momentum": {}}


def test_a_process_group_of_some_ranks():
    results = run_ranks(3, subgroup)[:2]
    assert_close_to(oracle_for(2, 10, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)
