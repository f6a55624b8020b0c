"""Dense gradients in 16 bits: what rounding takes waits in the residual, to the bit, and is sent later."""

import pytest
import torch
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.ops import Segments
from support.alone import SHAPES, Alone, alone, own, reduce
from support.models import Given, integers, normals
from support.ranks import run_ranks

TYPES = [torch.bfloat16, torch.float16]
DENSE = ("small", "bias")


def zeros():
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", TYPES)
def test_what_left_and_what_waits_is_what_came(dtype):
    # Integers of 14 bits, which neither type holds, and lr a power of two: all sums are exact.
    one = alone(momentum=0.0, lr=0.25, dense_wire_dtype=dtype)
    start = {name: one.parameter(name).clone() for name in DENSE}
    total = zeros()
    waited = False
    for step in range(30):
        gradients = {name: 1021 * g for name, g in integers(SHAPES, step).items()}
        one.train(gradients)
        for name in DENSE:
            total[name] += gradients[name]
            rest = one.state.memory.residual_of(name)
            moved = (start[name] - one.parameter(name)) / 0.25
            assert torch.equal(moved + rest, total[name])
            waited |= bool(rest.any())
    assert waited


@pytest.mark.parametrize("dtype", TYPES)
def test_a_sent_value_is_the_nearest_to_gradient_and_rest(dtype):
    one = alone(momentum=0.0, dense_wire_dtype=dtype)
    rest = {name: torch.zeros(SHAPES[name]) for name in DENSE}
    for step in range(5):
        gradients = normals(SHAPES, step)
        one.train(gradients)
        for name in DENSE:
            total = gradients[name] + rest[name]
            sent = total.to(dtype).float()
            rest[name] = total - sent
            assert torch.equal(one.model.get_parameter(name).grad, sent)
            assert torch.equal(one.state.memory.residual_of(name), rest[name])


def test_bytes_are_halved_and_counted():
    plain, half = alone(), alone(dense_wire_dtype="bfloat16")
    for one in (plain, half):
        one.train(normals(SHAPES, 0))
    dense = 4 * (400 + 300)
    assert 4 * 90_700 / half.state.stats.compression_ratio == pytest.approx(
        4 * 90_700 / plain.state.stats.compression_ratio - dense / 2
    )


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["big", "small"])
def test_a_step_that_is_left_out_leaves_the_rest_as_it_was(late, where):
    one = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16, on_nonfinite="skip", late=late)
    one.train(normals(SHAPES, 0))
    one.backward(zeros())  # the late verdict is read, and nothing is sent
    one.optimizer.step()
    before = {name: one.state.memory.residual_of(name).clone() for name in DENSE}
    assert all(rest.any() for rest in before.values())
    bad = normals(SHAPES, 1)
    bad[where][3] = float("inf")
    one.train(bad)
    for name in DENSE:
        assert torch.equal(one.state.memory.residual_of(name), before[name])


def test_discard_leaves_the_rest_as_it_was():
    one = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16, droppable=True)
    one.train(normals(SHAPES, 0))
    for drop in (False, True):
        before = {name: one.state.memory.residual_of(name).clone() for name in DENSE}
        one.backward(normals(SHAPES, 1))
        assert not torch.equal(one.state.memory.residual_of("bias"), before["bias"])
        one.state.discard(drop_gradient=drop)
        for name in DENSE:
            assert torch.equal(one.state.memory.residual_of(name), before[name])


def test_a_parameter_without_gradient_sends_nothing_of_its_rest():
    # DDP drops the result of a parameter that no rank has used.
    one = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16)
    one.train(normals(SHAPES, 0))
    before = one.state.memory.residual_of("bias").clone()
    assert before.any()
    one.train({**normals(SHAPES, 1), "bias": torch.zeros(300)})
    assert not one.model.get_parameter("bias").grad.any()
    assert torch.equal(one.state.memory.residual_of("bias"), before)


def test_a_loss_scale_does_not_leave_float16_s_range():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, dense_wire_dtype="float16"), lr=0.5, momentum=0.0)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    state = dgc.DGCState(one.model.named_parameters(), one.optimizer, one.state.config, grad_scaler=scaler)
    start = one.parameter("bias").clone()
    gradients = {name: 3.0 + torch.zeros(shape) for name, shape in SHAPES.items()}
    one.optimizer.zero_grad()
    scaler.scale(one.model(gradients)).backward()
    reduce(state, one.model)
    scaler.step(one.optimizer)
    scaler.update()
    assert torch.equal(one.parameter("bias"), start - 1.5)  # 3 * 65536 is above 65504


def test_a_dense_phase_rounds_without_touching_what_waits():
    one = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16)
    one.train(normals(SHAPES, 0))
    waiting = one.state.memory.residual_of("big").clone()
    one.state.dense = True
    gradients = normals(SHAPES, 1)
    one.train(gradients)
    assert torch.equal(one.model.get_parameter("big").grad, gradients["big"].bfloat16().float())
    assert torch.equal(one.state.memory.residual_of("big"), waiting)
    assert one.state.residual_norm > 0


def test_what_was_saved_without_loads_with_and_the_rest_is_saved():
    plain = alone(momentum=0.0)
    plain.train(normals(SHAPES, 0))
    assert "bias" not in own(plain.state)["residual"]
    half = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16)
    half.state.load_state_dict(plain.state.state_dict())
    assert torch.equal(half.state.memory.residual_of("big"), plain.state.memory.residual_of("big"))
    assert not half.state.memory.residual_of("bias").any()
    half.train(normals(SHAPES, 1))
    again = alone(momentum=0.0, dense_wire_dtype=torch.bfloat16)
    again.state.load_state_dict(half.state.state_dict())
    assert torch.equal(again.state.memory.residual, half.state.memory.residual)
    assert again.state.memory.residual_of("bias").any()
    with pytest.raises(ValueError, match="residual has bias, small, which this model does not"):
        plain.state.load_state_dict(half.state.state_dict())


def train(rank, world_size):
    model = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(model.parameters(), lr=0.25, momentum=0.0)
    config = dgc.DGCConfig(density=0.01, dense_wire_dtype=torch.bfloat16, wire_dtype="8bit")
    state = dgc.DGCState(model.named_parameters(), optimizer, config)
    state.register(model)
    for step in range(20):
        optimizer.zero_grad()
        model(normals(SHAPES, 10 * step + rank)).backward()
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    rests = {name: state.memory.residual_of(name).clone() for name in SHAPES}
    payload = Segments.from_rows([(0, 0, 0, 90_000, 900)]).payload(8).nbytes
    return parameters, rests, state.stats.bytes_sent - payload


def test_two_ranks_stay_bit_identical_and_keep_what_each_has_rounded():
    (one, rest, nbytes), (other, other_rest, _) = run_ranks(2, train)
    assert nbytes == 2 * (400 + 300)  # a ring of two: half of it twice
    start = dict(Given(SHAPES).named_parameters())
    for name, shape in SHAPES.items():
        assert torch.equal(one[name], other[name])
        total = torch.zeros(shape, dtype=torch.float64)
        for step in range(20):
            for rank in range(2):
                total += normals(SHAPES, 10 * step + rank)[name].double() / 2
        moved = (start[name].detach().double() - one[name].double()) / 0.25
        waits = (rest[name].double() + other_rest[name].double()) / 2
        # What the sum of two bfloat16 rounds away is nobody's: 2^-9 of a mean, at most, at each of 20 steps.
        bound = 1e-5 if name == "big" else 2.0**-9 * 20**0.5
        assert float((moved + waits - total).norm() / total.norm()) < bound
        assert not torch.equal(rest[name], other_rest[name])
