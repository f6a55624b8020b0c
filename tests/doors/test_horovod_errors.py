"""Errors behind Horovod: wrong arguments, processes that differ or are at another step, and processes that die."""

import inspect
import os
import signal
import time

import pytest
import torch
from torch import nn

import dgc
from support import horovod_ranks
from support.horovod_run import Run, dgc_hvd, hvd
from support.models import Given, integers, normals
from support.training import (
    SHAPES,
    assert_replicas_equal,
    seed_of,
)


def refused():
    """Returns the message of every wrong call, with one process."""
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sgd = dgc.SGD(net.parameters(), lr=0.1, momentum=0.9)
    named = list(net.named_parameters())
    calls = {
        "fp16": {"compression": hvd.Compression.fp16},
        "class": {"compression": dgc_hvd.DGCCompressor},
        "adasum": {"op": hvd.Adasum},
        "min": {"op": hvd.Min},
        "sparse": {"sparse_as_dense": True},
        "predivide": {"op": hvd.Sum, "gradient_predivide_factor": 2.0},
        "passes": {"backward_passes_per_step": 0},
        "groups": {"groups": -1},
        "twice in groups": {"groups": [[named[0][1]], [named[0][1]]]},
        "unnamed": {"named_parameters": named[:2]},
        "twice": {"named_parameters": [*named[:3], ("0.weight", named[3][1])]},
        "no tuples": {"named_parameters": net.parameters()},
        "set": {"process_set": hvd.ProcessSet([0])},
        "momentum": {"optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)},
    }
    messages = {}
    for name, wrong in calls.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            dgc_hvd.DistributedOptimizer(**{"optimizer": sgd, "named_parameters": named, **wrong})
        messages[name] = f"{caught.typename}: {caught.value}"
    with pytest.raises(ValueError, match="bucket_cap_mb: expected a number > 0, got 0"):
        dgc_hvd.DGCCompressor(bucket_cap_mb=0)
    embedding = nn.Embedding(300, 100, sparse=True)
    run = Run(module=embedding)
    try:
        run.train(torch.tensor([1, 2]))
    except ValueError as error:
        messages["sparse gradient"] = str(error)
    # One process, and the plain optimizer: Horovod registers no hooks, so dgc.SGD has to notice.
    plain = hvd.DistributedOptimizer(sgd, named, dgc_hvd.DGCCompressor())
    net(torch.ones(1, 10)).sum().backward()
    try:
        plain.step()
    except RuntimeError as error:
        messages["plain"] = str(error)
    return messages


def test_wrong_arguments_are_refused_with_the_reason(horovod):
    messages = horovod(1, refused)[0]
    for name, expected in {
        "fp16": "TypeError: compression: expected a DGCCompressor",
        "class": "such as dgc.horovod.DGCCompressor(dgc.DGCConfig())",
        "adasum": "got hvd.Adasum. DGC adds up",
        "min": "op: expected hvd.Average or hvd.Sum",
        "sparse": "sparse_as_dense: expected False",
        "predivide": "gradient_predivide_factor: expected 1",
        "passes": "backward_passes_per_step: expected an integer > 0, got 0",
        "groups": "groups should be a non-negative integer",
        "twice in groups": "can only appear once",
        "unnamed": "were not named",
        "twice": "Found duplicates: 0.weight",
        "no tuples": "sequence of tuples",
        "set": "process_set: expected a registered one",
        "momentum": "ValueError: optimizer: expected dgc.SGD, got torch.optim.SGD with momentum > 0",
        "sparse gradient": "use sparse=False",
        "plain": "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters())",
    }.items():
        assert expected in messages[name], name


def plain_horovod():
    net = Given(SHAPES)
    sgd = dgc.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, net.named_parameters(), dgc_hvd.DGCCompressor())
    try:
        net(normals(SHAPES, 0)).backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_the_compressor_in_plain_horovod_raises_with_the_right_line(horovod):
    for message in horovod(2, plain_horovod):
        assert "expected DGC's DistributedOptimizer, got Horovod's own" in message
        assert "compression=dgc_hvd.DGCCompressor(dgc.DGCConfig(...))" in message


def differ(what):
    try:
        if what == "density":
            Run(dgc.DGCConfig(density=0.008 * (1 + hvd.rank())))
        elif what == "group of a":
            Run(cap=0.1 if hvd.rank() else 25)
        elif what == "op":
            Run(horovod={"op": hvd.Sum if hvd.rank() else hvd.Average})
        else:
            Run(shapes={**SHAPES, "c": (130, 130 + hvd.rank())})
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["density", "group of a", "op", "parameter c"])
def test_processes_that_differ_are_found_at_the_start(horovod, what):
    for message in horovod(2, differ, what):
        assert f"{what}: rank 0 has" in message


def another_step():
    run = Run(shapes={"a": (200, 100)})
    for step in range(3):
        run.train(normals({"a": (200, 100)}, step))
    before = run.net.a.detach().clone()
    run.state._standing.step += hvd.rank()  # as if it had run one more backward pass
    try:
        run.optimizer.zero_grad()
        run.net(normals({"a": (200, 100)}, 9)).backward()
        run.optimizer.synchronize()
        return "no error"
    except dgc.PayloadError as error:
        run.state.discard(drop_gradient=False)
        waiting = run.state.memory.residual_of("a").count_nonzero()
        unchanged = torch.equal(before, run.net.a.detach())
        run.state._standing.step -= hvd.rank()
        run.train(normals({"a": (200, 100)}, 10))  # and it goes on
        return str(error), unchanged, int(waiting), torch.equal(before, run.net.a.detach())


def test_a_process_at_another_step_is_named_and_nothing_is_applied(horovod):
    for rank, (message, unchanged, waiting, still) in enumerate(horovod(2, another_step)):
        assert f"payload of rank {1 - rank}: it is at another step" in message
        assert unchanged
        assert waiting == 20_000  # what was sent is back
        assert not still


def another_phase():
    config = dgc.DGCConfig(density=0.008, warmup_steps=2, warmup_densities=(0.25,))
    shapes = {"a": (200, 100)}
    run = Run(config, shapes=shapes, momentum=0.0, lr=0.25)
    run.train(integers(shapes, hvd.rank()))
    run.state._standing.step += hvd.rank()  # the next one is after the warm-up there, and not yet here
    run.optimizer.zero_grad()
    run.net(integers(shapes, 2 + hvd.rank())).backward()
    with pytest.raises(RuntimeError) as caught:
        run.optimizer.step()
    run.state.discard(drop_gradient=False)
    run.state._standing.step -= hvd.rank()
    run.train(integers(shapes, 4 + hvd.rank()))
    total = sum(integers(shapes, 2 * step + hvd.rank())["a"] for step in range(3))
    return str(caught.value), {**run.result(), "total": total}


def test_payloads_of_different_sizes_are_an_error_and_lose_nothing(horovod):
    messages, results = zip(*horovod(2, another_phase), strict=True)
    assert all("ranks send different buckets, or are at different steps of the warm-up" in m for m in messages)
    assert_replicas_equal(results)
    moved = Given({"a": (200, 100)}).a.detach() - results[0]["parameters"]["a"]
    waiting = sum(r["residual"]["a"] for r in results)
    assert torch.equal(8 * moved + waiting, sum(r["total"] for r in results))


def die(moment):
    """Returns how many steps the survivor still did, and in how many seconds; rank 1 dies, and returns nothing."""
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    begin, done = time.monotonic(), 0
    # Around everything: the survivor may be behind, and meet the error in backward(), or in the step before.
    try:
        run = Run()
        for step in range(3):
            run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        if moment == "between exchanges":
            time.sleep(1)
            if hvd.rank() == 1:
                kill()
            time.sleep(2)  # Horovod is shut down by then, and backward() is told so
        if moment == "in backward" and hvd.rank() == 1:
            run.net.c.register_hook(kill)  # e was sent, a never will be
        for done in range(100):
            run.optimizer.zero_grad()
            run.net(normals(SHAPES, done)).backward()
            if hvd.rank() == 1:
                kill()
            run.optimizer.step()
    except hvd.mpi_ops.HorovodInternalError:
        return done, time.monotonic() - begin
    raise AssertionError("expected HorovodInternalError, got none in 100 steps")


@pytest.mark.parametrize("moment", ["between exchanges", "in backward", "after backward"])
def test_a_process_that_dies_is_horovods_error_on_the_others_and_not_a_hang(moment):
    pool = horovod_ranks.Pool(2, timeout=90)
    try:
        survivor, dead = pool.send(die, moment)
        ((done, seconds),) = pool.results([survivor])
        assert not dead.exists()
        assert done <= (moment == "after backward")  # where all of it may have arrived
        assert seconds < 60  # gloo gives a lost peer 30, where it does not see the connection close
    finally:
        pool.close()


def test_the_signature_is_horovods_but_for_the_default_compression():
    ours = inspect.signature(dgc_hvd.DistributedOptimizer).parameters
    theirs = inspect.signature(hvd.DistributedOptimizer).parameters
    assert list(ours) == [*theirs, "grad_scaler", "nodes"]
    assert {n for n in theirs if ours[n].default != theirs[n].default} == {"compression"}
