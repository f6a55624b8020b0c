"""Public bug reports, numbers 4, 7 and 8: torch's defaults, settings that are changed in a run, parameter groups.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import copy
import dataclasses

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc import ops
from dgc.ops import reference
from support.alone import Alone
from support.ddp_run import Run
from support.models import Given, integers, normals
from support.one_rank import CONFIG, WIDE, assert_same, memory_of, one, step
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

# 4: torch's defaults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, dgc.DGCConfig(density=1.0)])
def test_the_default_type_is_not_memory_s(gloo, dtype, config):
    straight, other = one(config, lr=0.5, momentum=0.99)[:2]
    torch.set_default_dtype(dtype)
    try:
        model, optimizer, state = one(config, lr=0.5, momentum=0.99)
        for i in range(4):
            step(model, optimizer, {n: g.float() for n, g in normals_float32(i).items()})
        saved = copy.deepcopy(state.state_dict())
        state.load_state_dict(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    for i in range(4):
        step(straight, other, normals_float32(i))
    assert state.memory.residual.dtype == state.memory.momentum.dtype == torch.float32
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def normals_float32(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float32) for n, shape in WIDE.items()}


@pytest.mark.parametrize("native", [True, False])
def test_the_default_device_is_not_memory_s(native, monkeypatch):
    if not native:
        for name in ("compress_", "unpack", "restore_", "subtract_"):
            monkeypatch.setattr(ops, name, getattr(reference, name))
    config = dataclasses.replace(CONFIG, clip_norm=5.0, droppable=True)
    gradients = [normals(WIDE, i) for i in range(3)]
    alone, straight = Alone(WIDE, config, lr=0.5, momentum=0.5), Alone(WIDE, config, lr=0.5, momentum=0.5)
    with torch.device("meta"):
        state = dgc.DGCState(alone.model.named_parameters(), alone.optimizer, config)
        alone.state = state
        for g in gradients:
            alone.train(g)
    for g in gradients:
        straight.train(g)
    assert_same(memory_of(state), memory_of(straight.state))
    assert state.memory.residual.device.type == "cpu"


# 7: settings that are changed in a run


def test_assignments_that_would_do_nothing_are_refused(gloo):
    _, _, state = one()
    with pytest.raises(AttributeError, match=r"state\.set_density\(density\)"):
        state.config = dgc.DGCConfig(density=0.5)
    for name in ("schedule", "optimizer", "density", "exchange"):
        with pytest.raises(AttributeError):
            setattr(state, name, None)
    for name in ("final", "warmup_steps", "phases"):
        with pytest.raises(AttributeError):
            setattr(state.schedule, name, 1)


def density_in_a_run(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    run.train(integers(SHAPES, seed_of(0, rank)))
    with pytest.raises(ValueError, match=r"density: rank 0 has 0\.5, rank 1 has 0\.25"):
        run.state.set_density(0.25 if rank else 0.5)
    with pytest.raises(ValueError, match=r"density: expected a number in \(0, 1\], such as 0\.01 for 1 %, got 7"):
        run.state.set_density(7)
    assert run.state.config.density == run.state.density == 0.008
    run.state.set_density(0.05)
    run.train(integers(SHAPES, seed_of(1, rank)))
    assert run.state.config.density == run.state.stats.density == 0.05
    assert abs(run.state.stats.sent_density - 0.05) < 1e-3
    dgc.checkpoint.save(run.state, f"{folder}/dgc")
    fresh = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    dgc.checkpoint.load(fresh.state, f"{folder}/dgc")
    assert fresh.state.density == 0.05
    run.train(integers(SHAPES, seed_of(2, rank)))
    return run.result()


def test_density_changes_in_a_run_on_all_ranks_and_is_saved(tmp_path):
    results = run_ranks(2, density_in_a_run, str(tmp_path))
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(i, r))[name] for i in range(3) for r in range(2))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


# 8: the optimizer's groups


def test_groups_in_another_order_keep_their_momentum(gloo):
    def run(reverse):
        model = DistributedDataParallel(Given(WIDE))
        groups = [{"params": [p], "momentum": mu} for p, mu in zip(model.parameters(), (0.0, 0.5, 0.9), strict=True)]
        optimizer = dgc.SGD(groups, lr=0.1)
        state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
        state.register(model)
        for i in range(4):
            if reverse and i == 2:
                optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]
            if i == 2:  # as a schedule does
                for group in optimizer.param_groups:
                    group["momentum"] *= 0.5
            step(model, optimizer, normals(WIDE, i))
        return memory_of(state)

    assert_same(run(True), run(False))


def test_a_parameter_in_no_group_is_named(gloo):
    model, optimizer, _ = one()
    step(model, optimizer, normals(WIDE, 0))
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(ValueError, match=r"optimizer: expected it to hold every parameter, but not a: "):
        step(model, optimizer, normals(WIDE, 1))


def test_a_schedule_that_brings_momentum_to_another_optimizer_is_refused(gloo):
    model, optimizer, _ = one(optimizer=torch.optim.SGD, lr=0.1)
    step(model, optimizer, normals(WIDE, 0))
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"expected dgc\.SGD, got torch\.optim\.SGD with momentum > 0"):
        step(model, optimizer, normals(WIDE, 1))
