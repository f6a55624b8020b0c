"""The numbers behind Horovod: those of DDP and of the oracle, what is saved, and the bytes that are sent."""

import pytest
import torch

import dgc
from support import ddp_run
from support.horovod_run import Run, hvd, train_given
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import (
    SHAPES,
    assert_close_to,
    assert_equal,
    assert_replicas_equal,
    oracle_for,
    seed_of,
)
from support.wire_oracle import payload_bytes

# the same numbers


SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAMW = {"optimizer": dgc.AdamW, "lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}


@pytest.mark.parametrize(("world_size", "settings"), [(2, SGD), (3, SGD), (2, ADAMW)], ids=["2", "3", "2 AdamW"])
def test_fifty_steps_have_the_bits_of_the_ddp_hook(horovod, world_size, settings):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    kwargs = {"config": config, **settings}
    dense = (20, 21) if world_size == 2 else ()
    results = horovod(world_size, train_given, 50, normals, kwargs, dense)
    assert_replicas_equal(results)
    # Dense parameters: DDP divides before the sum and Horovod after it, and with three ranks the order of the sum
    # depends on how a ring cuts the tensor. With two ranks both are exact.
    ddp = run_ranks(world_size, ddp_run.train_given, 50, normals, kwargs, dense)
    assert_equal(results, ddp, dense_too=world_size == 2)


def test_integer_gradients_match_the_oracle_exactly(horovod):
    results = horovod(2, train_given, 40, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(2, 40, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


def test_momentum_decay_clipping_and_warm_up_match_the_oracle(horovod):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    results = horovod(3, train_given, 30, normals, {"config": config, **sgd})
    density = lambda s: 0.25 if s < 6 else 0.05 if s < 12 else 0.008  # noqa: E731
    assert_close_to(oracle_for(3, 30, normals, density, lambda s: s >= 12, clip_norm=20.0, **sgd), results, 1e-5)


def test_one_process_compresses_too(horovod):
    results = horovod(1, train_given, 20, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(1, 20, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)
    assert 30 < results[0]["stats"].compression_ratio < 50


def against_torch_sgd(sgd):
    ours = Run(dgc.DGCConfig(density=1.0), **sgd)
    net = Given(SHAPES)
    names = [(f"theirs.{n}", p) for n, p in net.named_parameters()]
    theirs = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), **sgd), names)
    for step in range(30):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        ours.train(g)
        theirs.zero_grad()
        net(g).backward()
        theirs.step()
    return [(p.detach(), q.detach()) for p, q in zip(ours.net.parameters(), net.parameters(), strict=True)]


def test_density_one_is_plain_horovod_with_torch_sgd(horovod):
    for rank in horovod(2, against_torch_sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True}):
        assert all(torch.equal(ours, theirs) for ours, theirs in rank)


def in_groups():
    results = []
    for groups in (None, 2, [["a", "d"], ["e"]]):
        run = Run(dgc.DGCConfig(density=0.008, clip_norm=30.0), cap=25)
        if groups is not None:
            net = Given(SHAPES)
            chosen = [[net.get_parameter(n) for n in g] for g in groups] if isinstance(groups, list) else groups
            run = Run(dgc.DGCConfig(density=0.008, clip_norm=30.0), module=net, horovod={"groups": chosen})
        for step in range(10):
            run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        names = {id(p): n for n, p in run.net.named_parameters()}
        results.append((run.result(), [[names[id(p)] for p in g] for g in run.optimizer._fusion._groups]))
    return results


def test_groups_decide_what_travels_together_and_change_no_bit(horovod):
    for results in horovod(2, in_groups):
        (one, whole), (two, halves), (three, lists) = results
        assert whole == [["e", "d", "c", "b", "a"]]
        assert halves == [["a", "b", "c"], ["d", "e"]]
        assert lists == [["a", "d"], ["e"], ["b"], ["c"]]
        assert_equal([one, one], [two, three])


def sum_and_average(clip_norm, settings):
    config = dgc.DGCConfig(density=0.008, clip_norm=clip_norm)
    average, total = Run(config, **settings), Run(config, horovod={"op": hvd.Sum}, **settings)
    for step in range(20):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        average.train({n: hvd.size() * x for n, x in g.items()})
        total.train(g)
    return average.result(), total.result()


@pytest.mark.parametrize("clip_norm", [None, 40.0, 1e4])  # never, always and never clipped
def test_sum_is_the_average_of_gradients_times_the_number_of_processes(horovod, clip_norm):
    sgd = {"momentum": 0.5, "nesterov": True, "weight_decay": 0.25}
    for settings in (sgd, ADAMW):
        averages, totals = zip(*horovod(2, sum_and_average, clip_norm, settings), strict=True)
        assert_equal(averages, totals)  # times 2 is exact
    for average, total in horovod(3, sum_and_average, clip_norm, sgd):
        for name, p in average["parameters"].items():
            torch.testing.assert_close(p, total["parameters"][name])


def predivided(monkeypatch=None):
    factors = []
    reduce = hvd.allreduce_async_

    def spy(tensor, **kwargs):
        factors.append((kwargs["prescale_factor"], kwargs["postscale_factor"]))
        return reduce(tensor, **kwargs)

    ours = Run(horovod={"gradient_predivide_factor": 4.0}, momentum=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd, "allreduce_async_", spy)
        for step in range(5):
            ours.train(normals(SHAPES, seed_of(step, hvd.rank())))
    return ours.result(), factors


def test_predividing_splits_the_division(horovod):
    results, factors = zip(*horovod(2, predivided), strict=True)
    assert_equal(results, horovod(2, train_given, 5, normals, {"momentum": 0.0}))  # powers of two
    assert factors == ([(0.25, 2.0)] * 5,) * 2


# saving and resuming, here and behind DDP


def save_in_the_middle(folder, config, sgd):
    run = Run(config, **sgd)
    for step in range(16):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        if step == 6:
            parts = {"model": run.net, "optimizer": run.optimizer, "dgc": run.state}
            torch.save({k: p.state_dict() for k, p in parts.items()}, f"{folder}/horovod{hvd.rank()}.pt")
    return run.result()


def load(run, path):
    saved = torch.load(path, weights_only=True)
    run.net.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.state.load_state_dict(saved["dgc"])


def resume_here(folder, came_from, config, sgd):
    run = Run(config, **sgd)
    load(run, f"{folder}/{came_from}{hvd.rank()}.pt")
    for step in range(7, 16):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
    return run.result()


def resume_behind_ddp(rank, world_size, folder, config, sgd):
    run = ddp_run.Run(config, **sgd)
    load(run, f"{folder}/horovod{rank}.pt")
    for step in range(7, 16):
        run.train(normals(SHAPES, seed_of(step, rank)))
    return run.result()


def save_behind_ddp(rank, world_size, folder, config, sgd):
    run = ddp_run.Run(config, **sgd)
    for step in range(7):
        run.train(normals(SHAPES, seed_of(step, rank)))
    parts = {"model": run.net, "optimizer": run.optimizer, "dgc": run.state}
    torch.save({k: p.state_dict() for k, p in parts.items()}, f"{folder}/ddp{rank}.pt")


def test_a_run_goes_on_under_horovod_or_ddp_with_the_same_bits(horovod, tmp_path):
    config = dgc.DGCConfig(density=0.008, warmup_steps=10, warmup_densities=(0.25, 0.05))
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    straight = horovod(2, save_in_the_middle, str(tmp_path), config, sgd)
    run_ranks(2, save_behind_ddp, str(tmp_path), config, sgd)
    assert_equal(straight, horovod(2, resume_here, str(tmp_path), "horovod", config, sgd))
    assert_equal(straight, horovod(2, resume_here, str(tmp_path), "ddp", config, sgd))
    assert_equal(straight, run_ranks(2, resume_behind_ddp, str(tmp_path), config, sgd))


# bytes


def count_bytes():
    """Measures the tensors given to Horovod's collectives."""
    sizes = {"gather": [], "reduce": []}
    gather, reduce = hvd.allgather_async, hvd.allreduce_async_

    def spy_gather(tensor, **kwargs):
        sizes["gather"].append((kwargs["name"], tensor.nbytes))
        return gather(tensor, **kwargs)

    def spy_reduce(tensor, **kwargs):
        sizes["reduce"].append((kwargs["name"], tensor.nbytes))
        return reduce(tensor, **kwargs)

    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd, "allgather_async", spy_gather)
        patch.setattr(hvd, "allreduce_async_", spy_reduce)
        run.train(normals(SHAPES, hvd.rank()))
    tables = [bucket.sparse.receiving.rows for bucket in run.state._pass.buckets if bucket.sparse]
    formula = sum(payload_bytes((r.numel, r.entries) for r in rows) for rows in tables)
    return sizes, formula, run.state.stats.bytes_sent


def test_bytes_given_to_horovod_are_what_stats_and_the_formula_say(horovod):
    for sizes, formula, stats in horovod(3, count_bytes):
        # One of each for a group, however many parameters it has; e is alone, d, c, b are one, a is alone.
        assert sorted(name for name, _ in sizes["gather"]) == ["dgc.payload.a", "dgc.payload.d", "dgc.payload.e"]
        assert [name for name, _ in sizes["reduce"]] == ["dgc.dense.d"]
        gathered, reduced = (sum(n for _, n in sizes[kind]) for kind in ("gather", "reduce"))
        assert gathered == formula
        assert reduced == 4 * (100 + 1200)
        assert stats == 2 * gathered + 2 * 2 * reduced // 3
