"""DDP with nodes as workers, used in all the ways that a flat exchange is, and used wrongly."""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dgc
from dgc.ops import wire
from support.ddp_run import Run
from support.fsdp_run import IslandRun, shares_of
from support.messages import Messages, error_of
from support.models import Given, integers, normals
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.01, momentum_masking=False)
SETTINGS = {"lr": 0.25, "momentum": 0.5}
KINDS = ("parameters", "residual", "momentum", "exp_avg", "exp_avg_sq")


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        for kind in KINDS:
            assert all(torch.equal(t, other[kind][name]) for name, t in one.get(kind, {}).items()), kind


def train(rank, world_size, how):
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    state = {"late": True} if how == "late" else {}
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    config = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,), wire_dtype=dtype)
    run = NodeRun(2, config, state=state, optimizer=dgc.AdamW if how == "AdamW" else dgc.SGD, lr=0.05)
    if how == "in step":
        del run.state
        run.state = dgc.DGCState(run.net.named_parameters(), run.optimizer, config, mesh="auto")
        run.state.register(run.net, in_step=True)
    for step in range(8):
        gradients = normals(SHAPES, seed_of(step, rank))
        if how == "in step":
            run.optimizer.zero_grad()
            run.net(gradients).backward()
            run.optimizer.step()
        elif how == "accumulated":
            run.optimizer.zero_grad()
            with run.ddp.no_sync():
                run.ddp({name: g / 2 for name, g in gradients.items()}).backward()
            run.ddp({name: g / 2 for name, g in gradients.items()}).backward()
            run.optimizer.step()
        else:
            run.train(gradients)
    run.state.state_dict()  # reads a late verdict
    return run.result()


def test_a_late_verdict_accumulation_and_exchange_in_step_change_nothing():
    expected = run_ranks(4, train, "plain")
    assert_replicas_equal(expected)
    assert expected[0]["stats"].density == 0.01
    for how in ("late", "accumulated", "in step"):
        assert_same(expected, run_ranks(4, train, how))


@pytest.mark.parametrize("how", ["bfloat16", "AdamW"])
def test_other_values_on_the_wire_and_adamw(how):
    results = run_ranks(4, train, how)
    assert_replicas_equal(results)
    assert all(r["residual"][name].any() for r in results for name in LARGE)


def discard(rank, world_size, droppable):
    """Between two steps a pass that is given up, or whose gradients are thrown away."""
    run = NodeRun(2, dgc.DGCConfig(density=0.01, droppable=droppable, momentum_masking=True), **SETTINGS)
    run.train(integers(SHAPES, seed_of(0, rank)))
    before = run.result()
    run.ddp(integers(SHAPES, seed_of(1, rank))).backward()
    run.state.discard(drop_gradient=droppable)
    after = run.result()
    run.optimizer.zero_grad()
    if droppable:
        run.ddp(integers(SHAPES, seed_of(2, rank))).backward()
        run.net.a.grad = None
        run.optimizer.step()
    run.train(integers(SHAPES, seed_of(3, rank)))
    return before, after, run.result()


@pytest.mark.parametrize("droppable", [True, False])
def test_a_pass_that_is_given_up(droppable):
    results = run_ranks(4, discard, droppable)
    assert_replicas_equal([result for _, _, result in results])
    for before, after, _ in results:
        for kind in ("residual", "momentum"):
            assert all(torch.equal(t, after[kind][name]) for name, t in before[kind].items()) == droppable


def uneven(rank, world_size, late):
    config = dgc.DGCConfig(density=0.01, momentum_masking=False, on_nonfinite="skip")
    run = NodeRun(2, config, state={"late": late}, lr=0.25, momentum=0.0)
    with run.ddp.join():
        for step in range(4 + 2 * rank):
            run.train(integers(SHAPES, seed_of(step, rank)))
            if rank == 3 and step == 8 and not late:  # all others have left
                gradients = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
                gradients["c"][0, 0] = torch.nan
                run.train(gradients)
    return run.result()


@pytest.mark.parametrize("late", [False, True])
def test_join_loses_nothing_of_ranks_that_ran_out_of_data_one_after_the_other(late):
    results = run_ranks(4, uneven, late)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        # A node's gradient is the mean of its two ranks', and a parameter moves by a quarter of the nodes' mean.
        total = sum(integers(SHAPES, seed_of(s, r))[name] for r in range(4) for s in range(4 + 2 * r)) / 2
        moved = 8 * (start[name].detach() - results[0]["parameters"][name])
        waits = sum(torch.cat([results[2 * node + place]["residual"][name] for place in range(2)]) for node in range(2))
        assert torch.equal(moved.flatten() + waits, total.flatten()), name
        assert waits.any()
    assert [r["step"] for r in results] == [10] * 4


def scaled(rank, world_size):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = NodeRun(2, CONFIG, state={"grad_scaler": scaler}, **SETTINGS)
    for step in range(5):
        run.optimizer.zero_grad()
        gradients = integers(SHAPES, seed_of(step, rank))
        if step == 2 and rank == 1:
            gradients["c"][0, 0] = torch.inf
        scaler.scale(run.ddp(gradients)).backward()
        scaler.step(run.optimizer)
        scaler.update()
    return run.result(), scaler.get_scale()


def test_one_ranks_overflow_lowers_the_loss_scale_of_all():
    results = run_ranks(4, scaled)
    assert_replicas_equal([result for result, _ in results])
    assert [scale for _, scale in results] == [512.0] * 4
    assert [result["step"] for result, _ in results] == [4] * 4


def make(kind, places):
    return Run(CONFIG, **SETTINGS) if places is None else kind(places, CONFIG, **SETTINGS)


def save(rank, world_size, folder, kind, places):
    run = make(kind, places)
    for step in range(5):
        run.train(integers(SHAPES, seed_of(step, rank)))
    dgc.checkpoint.save(run.state, folder)
    return run.result()


def load(rank, world_size, folder, kind, places):
    run = make(kind, places)
    dgc.checkpoint.load(run.state, folder)
    loaded = run.result()
    for step in range(5, 8):
        run.train(integers(SHAPES, seed_of(step, rank)))
    return loaded, run.result()


@pytest.mark.parametrize(
    ("before", "now"),
    [((4, NodeRun, 2), (4, IslandRun, 2)), ((4, NodeRun, 2), (3, Run, None)), ((2, Run, None), (4, NodeRun, 2))],
    ids=["to FSDP2", "to DDP", "from DDP"],
)
def test_checkpoints_go_between_nodes_shards_and_flat_ranks(before, now, tmp_path):
    old = run_ranks(before[0], save, str(tmp_path / "dgc"), *before[1:])
    both = run_ranks(now[0], load, str(tmp_path / "dgc"), *now[1:])
    new = [loaded for loaded, _ in both]
    assert_replicas_equal([later for _, later in both])
    for kind in ("residual", "momentum"):
        for name in LARGE:
            first, then = shares_of(old, before[2], kind, name), shares_of(new, now[2], kind, name)
            torch.testing.assert_close(sum(then) / len(then), sum(first) / len(first), rtol=1e-6, atol=1e-5)
            if len(first) == len(then):
                assert all(torch.equal(a, b) for a, b in zip(first, then, strict=True)), (kind, name)


def save_whole(rank, world_size, file):
    run = NodeRun(2, CONFIG, optimizer=dgc.AdamW, lr=0.05)
    for step in range(3):
        run.train(integers(SHAPES, seed_of(step, rank)))  # whose sums are the same in any order of DDP's buckets
    torch.set_default_dtype(torch.bfloat16)  # which is not that of memory
    whole = run.state.full_state_dict()
    torch.set_default_dtype(torch.float32)
    assert bool(whole) == (rank == 0)
    if rank == 0:
        torch.save({"dgc": whole, "net": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    run.train(integers(SHAPES, seed_of(3, rank)))
    return run.result()


def load_whole(rank, world_size, file, make):
    saved = torch.load(file, weights_only=True)
    run = make()
    run.net.load_state_dict(saved["net"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.state.load_state_dict(saved["dgc"])
    before = run.result()
    run.train(integers(SHAPES, seed_of(3, rank)))
    return before, run.result()


def test_one_file_of_rank_0_has_all_nodes(tmp_path):
    file = str(tmp_path / "whole.pt")
    went_on = run_ranks(4, save_whole, file)
    again = partial(NodeRun, 2, CONFIG, optimizer=dgc.AdamW, lr=0.05)
    assert_same(went_on, [after for _, after in run_ranks(4, load_whole, file, again)])
    # Where each rank is a worker, the mean of what waits is the same.
    saved = torch.load(file, weights_only=True)["dgc"]["ranks"]
    assert sorted(saved) == ["0.0", "0.1", "1.0", "1.1"]
    flat = run_ranks(4, load_whole, file, partial(Run, CONFIG, optimizer=dgc.AdamW, lr=0.05))
    assert_replicas_equal([after for _, after in flat])
    for name in LARGE:
        nodes = [torch.cat([saved[f"{node}.{place}"]["residual"][name] for place in range(2)]) for node in range(2)]
        waits = sum(before["residual"][name] for before, _ in flat) / 4
        torch.testing.assert_close(waits, sum(nodes) / 2, rtol=1e-6, atol=1e-6)
        assert waits.any()


def misuse(rank, world_size):
    messages = Messages()
    run = NodeRun(2, CONFIG, **SETTINGS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    three = init_device_mesh("cpu", (4,))

    def state(**options):
        net = nn.Linear(200, 200)
        return dgc.DGCState(net.named_parameters(), dgc.SGD(net.parameters(), lr=0.1), CONFIG, **options)

    def dense():
        run.state.dense = True

    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    found = {
        "one dimension": error_of(lambda: state(mesh=three)),
        "a word": error_of(lambda: state(mesh="nodes")),
        "both": error_of(lambda: state(mesh=mesh, process_group=mesh.get_group(0))),
        "dense": error_of(dense),
        "auto": repr(state(mesh="auto")._standing.own_exchange.topology),
    }
    os.environ["LOCAL_WORLD_SIZE"] = "4" if rank else "2"
    found["sizes differ"] = error_of(lambda: state(mesh="auto"))
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "4", str(rank)
    found["one node"] = repr(state(mesh="auto")._standing.own_exchange.topology)
    return found, messages.lines


def test_each_wrong_use_says_what_to_write():
    expected = {
        "one dimension": ["ValueError", "expected two dimensions", "got 1"],
        "a word": ["ValueError", '"auto"', "'nodes'"],
        "both": ["ValueError", "process_group: expected None with mesh"],
        "dense": ["RuntimeError", "set_density(1.0)"],
        "auto": ["rows=2", "places=2"],
        "sizes differ": ["ValueError", "nodes of one size", "2/0, 4/1"],
        "one node": ["rows=4", "places=1"],
    }
    results = run_ranks(4, misuse)
    for found, _ in results:
        for case, parts in expected.items():
            assert all(part in found[case] for part in parts), (case, found[case])
    assert any("finds one node: each rank is a worker of its own" in line for line in results[0][1])


def on_two_machines(rank, world_size):
    messages = Messages()
    swapped, right = ("ab"[rank % 2], "ab"[rank // 2])
    for host in (swapped, right):
        with mock.patch("socket.gethostname", return_value=host):
            NodeRun(2, CONFIG)
    return [line for line in messages.lines if "swapped" in line]


def test_nodes_that_lie_across_machines_are_noticed():
    first, *others = run_ranks(4, on_two_machines)
    assert len(first) == 1
    assert "a node of ranks on a, b averages densely between machines" in first[0]
    assert others == [[]] * 3


def damaged(rank, world_size, where):
    """A payload is damaged between the nodes, or inside one."""
    run = NodeRun(2, CONFIG, lr=0.25, momentum=0.0)
    exchange = run.state.exchange
    start, gather = exchange.start, exchange.gather_in_node

    def started(name, payload, gathered, dense):
        if where == "between" and rank == 3 and payload is not None:
            payload = payload.clone()
            wire.header(payload)[0] += 1
        return start(name, payload, gathered, dense)

    def passed_on(name, own):
        if where == "inside" and rank == 3:
            own[8] += 1
        return gather(name, own)

    exchange.start, exchange.gather_in_node = started, passed_on
    run.ddp(integers(SHAPES, seed_of(0, rank))).backward()
    before = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    error = error_of(run.optimizer.step)
    return error, all(torch.equal(p, before[n]) for n, p in run.net.named_parameters())


@pytest.mark.parametrize(("where", "who"), [("between", range(4)), ("inside", (2, 3))])
def test_damaged_bytes_are_an_error_on_all_ranks_of_the_node(where, who):
    results = run_ranks(4, damaged, where)
    for rank in who:
        error, unchanged = results[rank]
        assert error.startswith("PayloadError: payload"), (rank, error)
        assert unchanged


def changed(rank, world_size, how):
    run = NodeRun(2, dgc.DGCConfig(density=0.01, on_changed_gradient="raise"), lr=0.25, momentum=0.0)
    run.ddp(normals(SHAPES, seed_of(0, rank))).backward()
    if how == "scaled":
        for p in run.net.parameters():
            p.grad.mul_(0.5)
    elif how == "zeroed":
        run.net.e.grad.zero_()
    return error_of(run.optimizer.step), run.state.residual_norm


def test_gradients_that_are_changed_or_zeroed_are_noticed_in_each_ranks_rows():
    for error, _ in run_ranks(4, changed, "scaled"):
        assert error.startswith("RuntimeError: dgc: expected gradients as backward() left them, got others for a, c, e")
    for error, _ in run_ranks(4, changed, "zeroed"):
        assert error.startswith("RuntimeError: optimizer: expected the gradient of every compressed parameter")
        assert "got None or zeros for e" in error
    assert [error for error, _ in run_ranks(4, changed, "left alone")] == [""] * 4


def everything(rank, world_size):
    """Half of the steps at a low density, then all entries."""
    messages = Messages()
    run = NodeRun(2, CONFIG, lr=0.25, momentum=0.0)
    for step in range(6):
        if step == 3:
            run.state.set_density(1.0)
        run.train(integers(SHAPES, seed_of(step, rank)))
    return run.result(), messages.lines


def test_at_density_1_nothing_waits_and_the_log_says_what_it_costs():
    results = run_ranks(4, everything)
    assert_replicas_equal([result for result, _ in results])
    start = dict(Given(SHAPES).named_parameters())
    for result, _ in results:
        assert not any(v.any() for v in result["residual"].values())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(step, rank))[name] for step in range(6) for rank in range(4)) / 4
        assert torch.equal(start[name].detach() - results[0][0]["parameters"][name], 0.25 * total), name
    said = [line for line in results[0][1] if "a dense all-reduce between 2 nodes would take fewer bytes" in line]
    assert len(said) == 1
    assert "density 100 %: 3 of 5 parameters compressed" in said[0]


def die_while_saving(rank, world_size, folder):
    """Rank 0 dies when all parts are written, and the other ranks wait for its word."""
    run = NodeRun(2, CONFIG, **SETTINGS)
    run.train(integers(SHAPES, seed_of(0, rank)))
    if rank == 0:
        dcp.FileSystemWriter.finish = lambda *args, **kwargs: os._exit(0)
    begin = time.monotonic()
    error = error_of(lambda: dgc.checkpoint.save(run.state, Path(folder, "dgc")))
    Path(folder, str(rank)).write_text(f"{time.monotonic() - begin:.1f} {error}")
    os._exit(0)  # nothing can be said over a group that has lost a rank


def test_a_rank_that_dies_while_all_save_is_an_error_on_the_others(tmp_path):
    with suppress(FileNotFoundError):
        run_ranks(4, die_while_saving, str(tmp_path))
    for rank in (1, 2, 3):
        seconds, error = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 10
        assert "a rank has gone" in error
