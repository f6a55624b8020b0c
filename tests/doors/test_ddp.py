"""The hook in real DistributedDataParallel on real gloo processes: invariants, DDP's features, and failures."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ddp_run import Run, train_given
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    assert_conserved,
    assert_replicas_equal,
    assert_resumed,
    oracle_for,
    seed_of,
)
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import dgc

# against the independent oracle


def test_integer_gradients_on_two_ranks_match_the_oracle_exactly():
    # Momentum 0: integers stay integers, so float32 and float64 agree in every bit, ties included.
    results = run_ranks(2, train_given, 40, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(2, 40, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_momentum_nesterov_decay_clipping_and_warm_up_match_the_oracle(world_size):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    results = run_ranks(world_size, train_given, 30, normals, {"config": config, **sgd})
    assert_replicas_equal(results)
    oracle = oracle_for(
        world_size,
        30,
        normals,
        lambda s: 0.25 if s < 6 else 0.05 if s < 12 else 0.008,
        lambda s: s >= 12,
        clip_norm=20.0,
        **sgd,
    )
    assert_close_to(oracle, results, 1e-5)


@pytest.mark.parametrize(("world_size", "wire_dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.float16)])
def test_replicas_stay_bit_identical_and_nothing_is_lost(world_size, wire_dtype):
    steps = 300
    config = dgc.DGCConfig(density=0.005, wire_dtype=wire_dtype)
    results = run_ranks(world_size, train_given, steps, normals, {"config": config, "momentum": 0.0, "lr": 0.1})
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = torch.zeros(SHAPES[name], dtype=torch.float64)
        for rank in range(world_size):
            for step in range(steps):
                total += normals(SHAPES, seed_of(step, rank))[name] / world_size
        moved = (start[name].detach().double() - results[0]["parameters"][name].double()) / 0.1
        waiting = sum(r["residual"][name].double() for r in results) / world_size
        assert float((moved + waiting - total).norm() / total.norm()) < 1e-5


def test_conservation_of_integers_is_exact_on_four_ranks():
    results = run_ranks(4, train_given, 60, integers, {"momentum": 0.0, "lr": 0.25})
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(step, rank))[name] for step in range(60) for rank in range(4))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(16 * moved + sum(r["residual"][name] for r in results), total)


def test_another_split_into_buckets_gives_the_same_bits():
    split = [
        run_ranks(3, train_given, 20, normals, {"ddp": {"bucket_cap_mb": mb}, "config": config})
        for mb in (0.02, 25)
        for config in [dgc.DGCConfig(density=0.008, clip_norm=30.0)]
    ]
    for name in SHAPES:
        one, other = (results[0]["parameters"][name] for results in split)
        if name in LARGE:
            assert torch.equal(one, other), name
        else:
            torch.testing.assert_close(one, other)


def compare_with_torch_sgd(rank, world_size, sgd):
    ours = Run(dgc.DGCConfig(density=1.0), **sgd)
    theirs = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(theirs.parameters(), **sgd)
    for step in range(30):
        g = normals(SHAPES, seed_of(step, rank))
        ours.train(g)
        optimizer.zero_grad()
        theirs(g).backward()
        optimizer.step()
    return [(p.detach(), q.detach()) for p, q in zip(ours.net.parameters(), theirs.module.parameters(), strict=True)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_density_one_is_torch_sgd(nesterov):
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    for ours, theirs in run_ranks(1, compare_with_torch_sgd, sgd)[0]:
        assert torch.equal(ours, theirs)
    for rank in run_ranks(3, compare_with_torch_sgd, sgd):
        for ours, theirs in rank:
            torch.testing.assert_close(ours, theirs)


def test_bytes_on_the_wire_are_what_stats_and_the_formula_say():
    for result in run_ranks(3, count_bytes):
        assert result["measured"] == result["stats"]


def count_bytes(rank, world_size):
    """Measures the tensors given to the collectives."""
    run = Run()
    sizes = {"gather": [], "reduce": []}
    start = run.state.exchange.start

    def spy(name, payload, gathered, dense):
        sizes["gather"].append(0 if payload is None else payload.nbytes)
        sizes["reduce"].append(0 if dense is None else dense.nbytes)
        return start(name, payload, gathered, dense)

    run.state.exchange.start = spy
    total = 0
    for step in range(3):
        sizes["gather"].clear()
        sizes["reduce"].clear()
        run.train(normals(SHAPES, step))
        total += run.state.stats.bytes_sent  # the first step's buckets are others
        assert run.state.stats.total_bytes_sent == total
    align = lambda n: -(-n // 16) * 16  # noqa: E731
    formula = 0
    for bucket in run.state._pass.buckets:
        rows = bucket.segments.tolist()
        if rows:
            k = sum(r[4] for r in rows)
            tiles = sum(-(-r[3] // 65536) for r in rows)
            formula += align(32 + len(rows)) + align(4 * tiles) + align(2 * k) + align(4 * k)
    assert sum(sizes["gather"]) == formula
    assert sum(sizes["reduce"]) == 4 * (100 + 1200)
    return {
        "measured": 2 * sum(sizes["gather"]) + 2 * 2 * sum(sizes["reduce"]) // 3,
        "stats": run.state.stats.bytes_sent,
    }


# DDP's own features


def accumulate(rank, world_size):
    run = Run(momentum=0.0)
    for step in range(6):
        run.optimizer.zero_grad()
        with run.ddp.no_sync():
            run.ddp(integers(SHAPES, seed_of(2 * step, rank))).backward()
        run.ddp(integers(SHAPES, seed_of(2 * step + 1, rank))).backward()
        run.optimizer.step()
    return run.result()


def test_no_sync_accumulates_before_anything_is_sent():
    results = run_ranks(2, accumulate)

    def sums(shapes, seed):
        step, rank = divmod(seed, 1000)
        first, second = (integers(shapes, seed_of(2 * step + i, rank)) for i in (0, 1))
        return {name: first[name] + second[name] for name in shapes}

    assert_close_to(oracle_for(2, 6, sums, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


def accumulate_without_no_sync(rank, world_size):
    run = Run()
    run.ddp(normals(SHAPES, rank)).backward()
    try:
        run.ddp(normals(SHAPES, rank)).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_two_synchronised_backwards_are_refused():
    assert all("no_sync()" in message for message in run_ranks(2, accumulate_without_no_sync))


def branches(rank, world_size, to_none):
    """Branch "e" is used every other step, "c" on rank 0 only."""
    run = Run(ddp={"find_unused_parameters": True, "bucket_cap_mb": 25}, momentum=0.0, lr=0.25)
    for step in range(20):
        g = integers(SHAPES, seed_of(step, rank))
        if step % 2:
            del g["e"], g["d"]
        if rank:
            del g["c"]
        run.optimizer.zero_grad(set_to_none=to_none)
        run.ddp(g).backward()
        run.optimizer.step()
    return run.result()


@pytest.mark.parametrize("to_none", [True, False])
def test_unused_parameters_lose_nothing(to_none):
    results = run_ranks(2, branches, to_none)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = torch.zeros(SHAPES[name])
        for step in range(20):
            for rank in range(2):
                if not (name == "e" and step % 2) and not (name == "c" and rank):
                    total += integers(SHAPES, seed_of(step, rank))[name]
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


def uneven(rank, world_size):
    run = Run(momentum=0.0, lr=0.25)
    with run.ddp.join():
        for step in range(6 + 4 * rank):
            run.train(integers(SHAPES, seed_of(step, rank)))
    return run.result()


def test_join_keeps_sending_the_residual_of_a_rank_that_ran_out_of_data():
    results = run_ranks(2, uneven)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(s, r))[name] for r in range(2) for s in range(6 + 4 * r))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total)
    assert [r["step"] for r in results] == [10, 10]


@pytest.mark.parametrize(
    "ddp",
    [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"bucket_cap_mb": 0.001}],
    ids=lambda d: next(iter(d)),
)
def test_ddp_options_do_not_change_the_result(ddp):
    results = run_ranks(2, train_given, 20, integers, {"ddp": ddp, "momentum": 0.0})
    assert_close_to(oracle_for(2, 20, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


class Mixed(nn.Module):
    """float32 and bfloat16 parameters and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(150, 200)
        self.second = nn.Linear(200, 150).bfloat16()
        self.frozen = nn.Linear(150, 150).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(self.first(x).relu().bfloat16()).float()).square().mean()


def train_mixed(rank, world_size, compiled=False):
    net = Mixed()
    module = torch.compile(net, backend="aot_eager") if compiled else net
    # torch.compile cuts the graph along the buckets and wants none below 1 MB.
    run = Run(module=module, lr=0.3, momentum=0.9, ddp={"bucket_cap_mb": 1})
    before = [p.detach().clone() for p in net.parameters()]
    losses = []
    torch.manual_seed(rank)
    x = torch.randn(64, 150)
    for _ in range(40):
        run.optimizer.zero_grad()
        loss = run.ddp(x)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss))
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    return {**run.result(), "losses": losses, "moved": moved, "names": list(run.state.memory.compressed)}


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_types_frozen_parameters_and_torch_compile(compiled):
    results = run_ranks(2, train_mixed, compiled)
    assert_replicas_equal(results)
    assert results[0]["moved"] == [True] * 4 + [False] * 2
    assert results[0]["names"] == ["first.weight", "second.weight"]
    assert results[0]["losses"][-1] < 0.5 * results[0]["losses"][0]


def refuse_sparse(rank, world_size):
    run = Run(module=nn.Embedding(300, 100, sparse=True))
    try:
        run.train(torch.tensor([1, 2, 3]))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_sparse_gradients_are_refused():
    for message in run_ranks(2, refuse_sparse):
        assert "sparse=False" in message


def switch(rank, world_size):
    run = Run(lr=0.1)
    for step in range(30):
        run.state.dense = 10 <= step < 20
        run.train(normals(SHAPES, seed_of(step, rank)))
        if step == 9:
            waiting = {n: run.state.memory.residual_of(n).clone() for n in LARGE}
        if step == 10:
            averaged = {n: run.state.memory.momentum_of(n).clone() for n in LARGE}
        if step == 19:
            assert all(torch.equal(run.state.memory.residual_of(n), waiting[n]) for n in LARGE)
            assert run.state.memory.diverged == set()
    return {**run.result(), "averaged": averaged}


def test_switching_to_dense_and_back_averages_momentum_once_and_keeps_the_residual():
    results = run_ranks(3, switch)
    assert_replicas_equal(results)
    for name in LARGE:
        assert all(torch.equal(r["averaged"][name], results[0]["averaged"][name]) for r in results)
        assert not torch.equal(results[1]["momentum"][name], results[0]["momentum"][name])
    # The average itself: ten sparse steps by the oracle, then one dense one.
    oracle = oracle_for(3, 10, normals, lambda s: 0.008, lambda s: True, lr=0.1)
    for name in LARGE:
        mean = sum(normals(SHAPES, seed_of(10, rank))[name].double() for rank in range(3)) / 3
        u = 0.5 * sum(oracle.u[rank][name] for rank in range(3)) / 3 + mean.numpy().ravel()
        np.testing.assert_allclose(results[0]["averaged"][name].numpy().ravel(), u, atol=1e-5)


# saving and resuming


def resume(rank, world_size, folder):
    config = dgc.DGCConfig(density=0.008, warmup_steps=10, warmup_densities=(0.25, 0.05))
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "config": config}
    straight = Run(**sgd)
    for step in range(16):
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 6:
            parts = {"model": straight.net, "optimizer": straight.optimizer, "dgc": straight.state}
            torch.save({key: part.state_dict() for key, part in parts.items()}, f"{folder}/{rank}.pt")
    resumed = Run(**sgd)
    saved = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    resumed.net.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    for step in range(7, 16):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_in_the_middle_of_warm_up_is_bit_exact(world_size, tmp_path):
    for straight, resumed in run_ranks(world_size, resume, str(tmp_path)):
        assert_resumed(straight, resumed, world_size)
        assert straight["step"] == resumed["step"] == 16


# what goes wrong


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
            dgc.__version__ = "0.0.9"
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
        run.state.step += 1  # as if it had run one more backward pass than the others
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
        if rank == 1:
            time.sleep(8)
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

        def die_at_the_second_bucket(gradients, **kwargs):
            if run.state._pass.outstanding:
                os.kill(os.getpid(), signal.SIGKILL)
            return hook(gradients, **kwargs)

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


def poison(rank, world_size, bucket_name, on_nonfinite, late=False):
    run = Run(dgc.DGCConfig(density=0.008, on_nonfinite=on_nonfinite), momentum=0.0, lr=0.25)
    run.state._late = late  # as on a GPU
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
