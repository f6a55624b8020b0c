"""Horovod with nodes as workers: DDP's numbers, what is kept, the bytes, and what is refused. Four processes."""

import os
import signal
import time

import pytest
import torch

import dgc
from support import horovod_ranks
from support.fsdp_run import shares_of, whole
from support.horovod_run import Run, hvd
from support.messages import Messages, error_of
from support.models import Given, integers, normals
from support.node_run import NodeRun, parts
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

STEPS = 6
ODD = {**SHAPES, "f": (1, 20000), "g": (3, 6000), "h": (2, 3, 4)}
COMPRESSED = LARGE | {"f", "g"}
KINDS = ("parameters", "residual", "momentum", "exp_avg", "exp_avg_sq")
WAYS = {
    "SGD": (
        {"density": 0.008, "clip_norm": 60.0, "check_every": 2},
        {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01},
    ),
    "AdamW": (
        {"density": 0.008, "warmup_steps": 3, "warmup_densities": (0.25,), "wire_dtype": torch.bfloat16},
        {"optimizer": dgc.AdamW, "lr": 0.01},
    ),
}


def run_of(config, **settings):
    """Returns a run whose nodes are the hosts, with several groups."""
    horovod = {"nodes": "auto", **settings.pop("horovod", {})}
    return Run(dgc.DGCConfig(**config), ODD, horovod=horovod, cap=0.05, **settings)


def train(run, steps, make=normals, factor=1.0):
    for step in steps:
        g = {name: factor * one for name, one in make(ODD, seed_of(step, hvd.rank())).items()}
        # On every second rank gradients come in the opposite order, so that ranks complete their groups in another.
        run.train(dict(reversed(g.items())) if hvd.rank() % 2 else g)
    return parts(run.net, run.state)


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        assert one["step"] == other["step"]
        for kind in KINDS:
            assert one.get(kind, {}).keys() == other.get(kind, {}).keys()
            for name, tensor in one.get(kind, {}).items():
                assert torch.equal(tensor, other[kind][name]), (kind, name)


def both_ways():
    return [train(run_of(config, **settings), range(STEPS)) for config, settings in WAYS.values()]


def behind_ddp(rank, world_size):
    results = []
    for config, settings in WAYS.values():
        run = NodeRun(2, dgc.DGCConfig(**config), ODD, **settings)
        for step in range(STEPS):
            run.train(normals(ODD, seed_of(step, rank)))
        results.append(run.result())
    return results


def test_the_bits_of_nodes_under_ddp(horovod):
    """Two nodes of two: both sums have two terms, and a division by two is exact before the sum and after it.

    Nodes under DDP are compared with a simulation in test_nodes_numbers.py and test_fsdp_numbers.py.
    """
    ways = zip(*horovod(4, both_ways), strict=True), zip(*run_ranks(4, behind_ddp), strict=True)
    for ours, theirs in zip(*ways, strict=True):
        assert_replicas_equal(ours)
        assert_same(ours, theirs)
        assert all(2 * r["residual"]["e"].numel() == 260 * 260 for r in ours)


def conserve(bad):
    """Steps that are skipped, and two whose backward passes break off behind some groups."""

    def fail(gradient):
        raise ArithmeticError

    run = run_of({"density": 0.008, "on_nonfinite": "skip", "droppable": True}, lr=0.25, momentum=0.0)
    for step in range(STEPS):
        g = integers(ODD, seed_of(step, hvd.rank()))
        if step in bad and hvd.rank() == 3:
            g["e"][-1, -1] = torch.nan
        if step in (3, 5):
            hook = run.net.a.register_hook(fail)
            with pytest.raises(ArithmeticError):
                run.train(g)
            hook.remove()
            if step == 3:
                run.optimizer.synchronize()
            else:  # as after an error of ours: what has been started is still under way
                run.optimizer._start_afresh()
                assert hvd.mpi_ops._handle_map
            run.state.discard(drop_gradient=True)
            assert not hvd.mpi_ops._handle_map
        run.train(g)
    return parts(run.net, run.state)


def test_what_moved_and_what_waits_is_every_gradient_there_was(horovod):
    bad = [1, 4]
    results = horovod(4, conserve, bad)
    assert_replicas_equal(results)
    assert [r["stats"].skipped for r in results] == [len(bad) + 1] * 4
    start = dict(Given(ODD).named_parameters())
    for name in COMPRESSED:
        waiting = sum(whole(results, 2, 2, "residual", name)) / 2
        moved = (start[name].detach() - results[0]["parameters"][name]).flatten() / 0.25
        total = sum(integers(ODD, seed_of(s, r))[name].flatten() for s in range(STEPS) for r in range(4)) / 4
        last = -1 if name == "e" else None  # where the gradient was NaN
        assert torch.equal((moved + waiting)[:last], total[:last]), name


def save_and_go_on(folder):
    """Returns a straight run, one resumed in the middle, and flat ranks that have loaded all states."""
    config, settings = WAYS["AdamW"]
    run = run_of(config, **settings)
    train(run, range(4))
    saved = {"model": run.net.state_dict(), "optimizer": run.optimizer.state_dict(), "dgc": run.state.state_dict()}
    torch.save(saved, path := f"{folder}/{hvd.rank()}")
    middle = parts(run.net, run.state)
    hvd.barrier()
    flat = Run(dgc.DGCConfig(**config), ODD, **settings)
    flat.state.load_state_dict([torch.load(f"{path[:-1]}{rank}")["dgc"] for rank in range(4)])
    run.rebind()
    resumed, saved = run_of(config, **settings), torch.load(path)
    resumed.net.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    error = error_of(run.state.full_state_dict)
    return train(run, range(4, 8)), train(resumed, range(4, 8)), middle, parts(flat.net, flat.state), error


def test_saved_states_go_on_with_the_same_bits_and_load_on_ranks_that_are_workers(horovod, tmp_path):
    straight, resumed, middle, flat, errors = zip(*horovod(4, save_and_go_on, str(tmp_path)), strict=True)
    assert_same(straight, resumed)
    for name in COMPRESSED:
        for kind in ("residual", "exp_avg"):
            before, after = (shares_of(r, p, kind, name) for r, p in ((middle, 2), (flat, None)))
            assert torch.allclose(sum(before) / 2, sum(after) / 4, atol=1e-7), (kind, name)
    assert all("under Horovod state_dict() on each" in error for error in errors)


def count_and_sum():
    """Measures the tensors given to Horovod's collectives; and trains with op=hvd.Sum."""
    sizes = {}

    def spy(kind, function):
        def call(tensor, **kwargs):
            if "." in (name := kwargs["name"]) and "sum" not in name:
                key = kind, tuple(kwargs["process_set"].ranks)
                sizes[key] = sizes.get(key, 0) + tensor.nbytes
            return function(tensor, **kwargs)

        return call

    run = run_of({"density": 0.05}, lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("allgather_async", "allreduce_async_", "alltoall_async"):
            patch.setattr(hvd, kind, spy(kind, getattr(hvd, kind)))
        train(run, [0])
    stats = run.state.stats
    sums = [
        train(
            run_of({"density": 0.008, "clip_norm": clip}, horovod={"op": op}, lr=0.25, momentum=0.5), range(3), factor=f
        )
        for clip in (None, 40.0)
        for op, f in ((hvd.Average, 4.0), (hvd.Sum, 1.0))
    ]
    return sizes, stats, sums


def test_the_bytes_are_what_stats_say_and_a_sum_is_one_over_the_ranks(horovod):
    for rank, (sizes, stats, sums) in enumerate(horovod(4, count_and_sum)):
        node, across = ((0, 1), (2, 3))[rank // 2], ((0, 2), (1, 3))[rank % 2]
        assert sizes.keys() == {
            ("alltoall_async", node),
            ("allgather_async", node),
            ("allgather_async", across),
            ("allreduce_async_", across),
        }
        assert stats.bytes_sent == sizes["allgather_async", across] + sizes["allreduce_async_", across]
        # Of what is scattered, half stays here.
        assert stats.bytes_in_node == sizes["alltoall_async", node] / 2 + sizes["allgather_async", node]
        assert stats.bytes_sent < stats.bytes_dense / 5
        averages, totals = sums[::2], sums[1::2]
        assert_same(averages[:1], totals[:1])
        assert torch.equal(averages[0]["parameters"]["e"], totals[0]["parameters"]["e"])


def exchange_with(nodes, hosts=None, config=None, **horovod):
    """Returns which exchange a run gets, or the error, where ranks seem to be on these hosts; and what was logged."""
    with pytest.MonkeyPatch.context() as patch:
        if hosts is not None:
            patch.setattr(hvd, "cross_rank", lambda: hosts[hvd.rank()])
            patch.setattr("socket.gethostname", lambda: f"host {hosts[hvd.rank()]}")
        messages, found = Messages(), []
        given = {} if nodes is None else {"nodes": nodes}
        error = error_of(lambda: found.append(Run(config, horovod={**given, **horovod})))
        if not found:
            return error
        exchange = found[0].state.exchange
        name = f"{type(exchange).__name__} of {exchange.process_set.ranks}"
        return [name, error_of(lambda: setattr(found[0].state, "dense", True)), *messages.lines]


def misuse():
    added = {ranks: hvd.ProcessSet(list(ranks)) for ranks in ((0, 3), (1, 2), (0, 1, 2), (0, 1))}
    for ranks in ((0, 3), (1, 2), (0, 1, 2)):
        hvd.add_process_set(added[ranks])
    run_of({})  # adds those of the hosts
    numbers = {tuple(r): number for number, r in hvd.mpi_ops._basics._get_process_set_ids_and_ranks().items()}

    def known(*ranks):
        process_set = hvd.ProcessSet(list(ranks))
        process_set.process_set_id = numbers[ranks]
        return process_set

    rank = hvd.rank()
    node, across = (known(*((0, 1), (2, 3))[rank // 2]), known(*((0, 2), (1, 3))[rank % 2]))
    odd = known(0, 3) if rank in (0, 3) else known(1, 2)
    found = {
        "pair": exchange_with((node, across)),
        "swapped": exchange_with((across, node), hosts=[0, 0, 1, 1]),
        "one node": exchange_with("auto", hosts=[0, 0, 0, 0]),
        "one rank a node": exchange_with("auto", hosts=[0, 1, 2, 3]),
        "sizes": exchange_with("auto", hosts=[0, 0, 0, 1]),
        "ranks differ": exchange_with("auto" if rank else None),
        "configurations differ": exchange_with("auto", config=dgc.DGCConfig(density=0.2 if rank == 3 else 0.1)),
        "no grid": exchange_with((node, odd)),
        "a rank is missing": exchange_with((known(0, 1, 2), across)),
        "not registered": exchange_with((added[0, 1], across)),
        "a name": exchange_with("host"),
        "a set beside": exchange_with("auto", process_set=node),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOROVOD_ELASTIC", "1")
        found["elastic"] = exchange_with("auto")
    return found


EXPECTED = {
    "pair": ["HorovodIslands", "leave that out"],
    "swapped": ["HorovodIslands"],
    "one node": ["HorovodExchange of [0, 1, 2, 3]"],
    "one rank a node": ["HorovodExchange of [0, 1, 2, 3]"],
    "sizes": ["ValueError: nodes: expected nodes of one size", "got [0, 1, 2] and [3]", "as many processes"],
    "ranks differ": ['ValueError: nodes: expected the same on all processes, got None on rank 0, "auto" on rank 1'],
    "configurations differ": ["ValueError: DGCState: expected the same", "density: rank 0 has 0.1, rank 3 has 0.2"],
    "no grid": ["ValueError: nodes: expected nodes of one size", "[[0, 1], [0, 3]] on rank 0, [[0, 1], [1, 2]] on"],
    "a rank is missing": [
        "ValueError: nodes: expected nodes of one size that hold all ranks once",
        "[[0, 1, 2], [0, 2]]",
    ],
    "not registered": ["ValueError: nodes: expected registered process sets, got ProcessSet(", "hvd.init("],
    "a name": ['ValueError: nodes: expected "auto", or two process sets', "got 'host'"],
    "a set beside": ["ValueError: process_set: expected the global one with nodes, got ProcessSet("],
    "elastic": ["ValueError: nodes: expected None in an elastic run", "Leave nodes out"],
}


def test_nodes_that_do_not_fit_are_refused_and_single_ones_are_exchanged_flatly(horovod):
    results = horovod(4, misuse)
    for rank, found in enumerate(results):
        assert found.keys() == EXPECTED.keys()
        for case, texts in EXPECTED.items():
            assert all(text in str(found[case]) for text in texts), (rank, case, found[case])
        assert f"of [{rank % 2}, {2 + rank % 2}]" in found["pair"][0]
    assert any("a node of ranks on host 0, host 1 averages densely" in line for line in results[0]["swapped"])
    assert not any("averages densely" in line for line in results[0]["pair"])
    for case in ("one node", "one rank a node"):
        assert any(f"nodes finds {case}: each rank is a worker of its own" in line for line in results[0][case])


def registered():
    """Horovod has the process sets of the hosts; and then seems to have none, and takes no others."""
    found = exchange_with("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd.mpi_ops._basics, "_get_process_set_ids_and_ranks", dict)
        return found, exchange_with("auto")


def die():
    run = run_of({"density": 0.008}, lr=0.1)
    train(run, range(3))
    if hvd.rank() == 3:
        run.net.c.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(hvd.mpi_ops.HorovodInternalError):
        train(run, range(3, 100))


def test_process_sets_are_those_of_init_or_the_error_says_which_to_pass_and_a_death_ends_all():
    pool = horovod_ranks.Pool(4, [[0, 1], [2, 3], [0, 2], [1, 3]], nodes=2)
    try:
        for rank, ((name, *_), error) in enumerate(pool(registered)):
            assert name == f"HorovodIslands of [{rank % 2}, {2 + rank % 2}]"
            assert error.startswith("ValueError: nodes: expected a Horovod that adds process sets")
            for way in ('process_sets="dynamic"', "HOROVOD_DYNAMIC_PROCESS_SETS=1", "hvd.ProcessSet([0, 2])"):
                assert way in error
        # The others get Horovod's error, or are ended by Horovod, which does that where there are process sets.
        paths, deadline = pool.send(die), time.monotonic() + 60
        for rank, (path, process) in enumerate(zip(paths, pool.processes, strict=True)):
            while not path.exists() and process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.exitcode in ({-signal.SIGKILL} if rank == 3 else {-signal.SIGABRT, None})
            assert process.exitcode is not None or pool.results([path]) == [None]
    finally:
        pool.close()
