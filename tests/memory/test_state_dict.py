"""State dicts of one rank: refused where they do not fit, and resumed from to the bit."""

import pytest
import torch

import dgc
from support.alone import SHAPES, Alone, alone, own
from support.models import normals


def test_a_state_dict_in_the_middle_of_a_step_is_refused():
    one = alone()
    one.backward(normals(SHAPES, 0))
    with pytest.raises(RuntimeError, match=r"between optimizer\.step"):
        one.state.state_dict()
    one.optimizer.step()
    assert own(one.state)["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "step is missing"),
        (lambda s: s.update(version=99), r"state_dict\['version'\]: expected 1 or 2, got 99"),
        (lambda s: s.update(version="1"), r"state_dict\['version'\]: expected 1 or 2, got '1'"),
        (lambda s: s.update(rank=1), r"state_dict\['rank'\]: expected a rank of 1, got 1"),
        (lambda s: s.update(rank=1, world_size=4), r"residual of rank 0, 2, 3 of 4, .* got that of rank 1"),
        (lambda s: s.update(world_size=True), r"\['world_size'\]: expected a number of ranks up to .*, got True"),
        (lambda s: s.update(world_size=2**31 - 1), r"\['world_size'\]: expected .* up to 1048576, got 2147483647"),
        (lambda s: s.update(world_size=2**20), r"residual of rank 1, 2, 3, .*, 20 and 1048555 more of 1048576"),
        (lambda s: s.update(step=-1), r"state_dict\['step'\]: expected a number of steps, got -1"),
        (lambda s: s.update(step=torch.ones(1)), r"state_dict\['step'\]: expected a number of steps, got tensor"),
        (lambda s: s.update(dense=1), r"state_dict\['dense'\]: expected True or False, got 1"),
        (lambda s: s.update(diverged={}), r"state_dict\['diverged'\]: expected a list of parameter names, got {}"),
        (lambda s: s.update(diverged=[1]), r"state_dict\['diverged'\]: expected a list of parameter names"),
        (
            lambda s: s.update(entries=[1.0]),
            r"\['entries'\]: expected a number of entries for each parameter",
        ),
        (lambda s: s.update(entries=[-1]), r"state_dict\['entries'\]: expected a number of .*, got \[-1\]"),
        (lambda s: s.update(momentum=None), r"state_dict\['momentum'\]: expected tensors by parameter name, got None"),
        (lambda s: s["residual"].pop("big"), "residual of big is missing"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    one = alone()
    one.train(normals(SHAPES, 0))
    v = one.state.memory.residual.clone()
    state = {"version": 1, **own(one.state)}  # as dgc 0.1 wrote it
    change(state)
    with pytest.raises(ValueError, match=message):
        one.state.load_state_dict(state)
    assert torch.equal(one.state.memory.residual, v)
    assert one.state.step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: [], "expected at least one, got none"),
        (lambda states: [states[0]] * 2, "expected one of each rank, got those of rank 0, 0"),
        (lambda states: states[1:], "rank 0 of 1 takes over the residual of rank 0 of 2, .* got that of rank 1"),
        (lambda states: [states[0], {**states[1], "step": 5}], "state_dict 1 was rank 1 of 2 at step 5"),
        (lambda states: [states[0], {**states[1], "world_size": 3}], "state_dict 1 was rank 1 of 3 at step 1"),
        (lambda states: [states[0], {**states[1], "momentum": {}}], "of one group at one step"),
        (lambda states: [states[0], 7], "expected that of a DGCState, got int"),
    ],
)
def test_state_dicts_that_do_not_fit_each_other_change_nothing(change, message):
    one = alone()
    one.train(normals(SHAPES, 0))
    v = one.state.memory.residual.clone()
    states = [{"version": 1, **own(one.state), "rank": rank, "world_size": 2} for rank in range(2)]
    with pytest.raises(ValueError, match=message):
        one.state.load_state_dict(change(states))
    assert torch.equal(one.state.memory.residual, v)
    one.state.load_state_dict(states)
    assert torch.equal(one.state.memory.residual, v)  # the mean of two equal ones


def test_resume_on_one_rank_in_the_middle_of_warm_up_is_bit_exact(tmp_path):
    def fresh() -> Alone:
        config = dgc.DGCConfig(density=0.01, warmup_steps=8, warmup_densities=(0.25, 0.05))
        return Alone(SHAPES, config, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)

    straight = fresh()
    for step in range(12):
        straight.train(normals(SHAPES, step))
        if step == 4:
            parts = {"model": straight.model, "optimizer": straight.optimizer, "dgc": straight.state}
            torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "at5.pt")
    resumed = fresh()
    saved = torch.load(tmp_path / "at5.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    for step in range(5, 12):
        resumed.train(normals(SHAPES, step))
    for name in SHAPES:
        assert torch.equal(resumed.parameter(name), straight.parameter(name))
    assert torch.equal(resumed.state.memory.residual, straight.state.memory.residual)
    assert torch.equal(resumed.state.memory.momentum, straight.state.memory.momentum)


def test_loading_its_own_state_dict_changes_nothing():
    one = alone()
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual.clone(), one.state.memory.momentum.clone()
    one.state.load_state_dict(one.state.state_dict())
    assert torch.equal(one.state.memory.residual, v)
    assert torch.equal(one.state.memory.momentum, u)
