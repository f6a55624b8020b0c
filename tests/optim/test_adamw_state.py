"""dgc.AdamW's state: from torch.optim.AdamW, refused between kinds of optimizers, saved, pickled and divided."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import Alone, own
from support.models import Given, normals

SHAPES = {"weight": (64, 33), "bias": (17,), "scalar": ()}
MIXED = {"big": (300, 300), "small": (20, 20), "bias": (300,)}
EVERYTHING = dgc.DGCConfig(density=1.0)
CONFIG = dgc.DGCConfig(density=0.01)
ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}


def torch_step(model, optimizer, gradients):
    optimizer.zero_grad()
    model(gradients).backward()
    optimizer.step()


def torch_run(kind=torch.optim.AdamW, shapes=SHAPES, steps=5, **settings):
    """Returns a model and its optimizer after some dense steps."""
    model = Given(shapes)
    optimizer = kind(model.parameters(), **settings)
    for step in range(steps):
        torch_step(model, optimizer, normals(shapes, step))
    return model, optimizer


def adamw(shapes=MIXED, seeds=(), config=None, **settings):
    one = Alone(shapes, config or dgc.DGCConfig(density=0.01), optimizer=dgc.AdamW, **{**ADAM, **settings})
    for seed in seeds:
        one.train(normals(shapes, seed))
    return one


def assert_same(one, other):
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(one.state.memory.residual, other.state.memory.residual)
    for kind, flat in one.state.memory.kinds.items():
        assert torch.equal(flat, other.state.memory.kinds[kind]), kind
    for s, t in zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert s["step"] == t["step"]


# from torch.optim.AdamW, and to it


@pytest.mark.parametrize("kinds", [(torch.optim.AdamW, dgc.AdamW), (torch.optim.Adam, dgc.Adam)], ids=str)
def test_a_dense_run_goes_on_with_torch_s_bits(kinds):
    settings = {**ADAM, "weight_decay": 0.1 if kinds[1] is dgc.AdamW else 0.0}
    model, theirs = torch_run(kinds[0], **settings)
    ours = Alone(SHAPES, EVERYTHING, optimizer=kinds[1], lr=1.0)
    ours.model.load_state_dict(model.state_dict())
    ours.optimizer.load_state_dict(theirs.state_dict())
    for step in range(5, 25):
        ours.train(normals(SHAPES, step))
        torch_step(model, theirs, normals(SHAPES, step))
        for name, p in model.named_parameters():
            assert torch.equal(ours.parameter(name), p)


def test_a_dense_run_that_goes_on_has_lost_nothing_and_is_not_warned(recwarn):
    ours = adamw()
    ours.optimizer.load_state_dict(torch_run(shapes=MIXED)[1].state_dict())
    ours.train(normals(MIXED, 5))
    assert not [w for w in recwarn if "this DGCState none" in str(w.message)]
    late = adamw()
    late.optimizer.load_state_dict(ours.optimizer.state_dict())
    with pytest.warns(UserWarning, match="the optimizer has taken 6 steps, and this DGCState none"):
        late.train(normals(MIXED, 6))


def test_moments_of_a_dense_run_are_a_compressed_parameter_s_from_the_first_pass():
    model, theirs = torch_run(shapes=MIXED, **ADAM)
    ours = adamw(config=CONFIG, lr=1.0)
    ours.model.load_state_dict(model.state_dict())
    ours.optimizer.load_state_dict(theirs.state_dict())
    assert ours.optimizer.state_dict()["state"][0]["exp_avg"].shape == MIXED["big"]
    ours.train(normals(MIXED, 5))
    torch_step(model, theirs, normals(MIXED, 5))
    kept, state = ours.state.memory.of("big"), theirs.state[model.big]
    for kind in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(kept[kind], state[kind])
    assert ours.optimizer.state[ours.model.big]["step"] == 6
    # They have moved: what the optimizer saves from now on has no elements.
    saved = ours.optimizer.state_dict()["state"]
    assert [s[kind].numel() for s in saved.values() for kind in ("exp_avg", "exp_avg_sq")] == [0] * 6


def test_moments_that_were_loaded_wait_until_they_are_taken_and_are_saved_meanwhile():
    model, theirs = torch_run(**ADAM)
    optimizer, again = (dgc.AdamW(model.parameters()) for _ in range(2))
    optimizer.load_state_dict(theirs.state_dict())
    again.load_state_dict(optimizer.state_dict())
    saved = {p: {kind: state[kind].clone() for kind in ("exp_avg", "exp_avg_sq")} for p, state in theirs.state.items()}
    torch_step(model, theirs, normals(SHAPES, 5))  # what was loaded is a copy
    for one in (optimizer, again):
        taken = one.take_moments()
        for p, state in saved.items():
            assert all(torch.equal(taken[p][kind], value) for kind, value in state.items())
        assert one.take_moments() == {}
        assert (one.param_groups[0]["lr"], one.steps_of(model.bias)) == (0.01, 5)


def test_a_saved_state_of_dgc_replaces_what_torch_s_optimizer_brought():
    one = adamw(seeds=range(3))
    other = adamw()
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(torch_run(shapes=MIXED)[1].state_dict())
    other.optimizer.load_state_dict({**one.optimizer.state_dict()})
    other.state.load_state_dict(copy.deepcopy(one.state.state_dict()))
    for run in (one, other):
        run.train(normals(MIXED, 3))
    assert_same(one, other)


def test_groups_and_defaults_are_those_of_torch():
    for ours, theirs in ((dgc.AdamW, torch.optim.AdamW), (dgc.Adam, torch.optim.Adam)):
        one, other = (kind(Given(SHAPES).parameters(), lr=0.1) for kind in (ours, theirs))
        assert one.defaults == other.defaults


# what is refused


def assert_refused(saved, match, kind=dgc.AdamW):
    one = Alone(SHAPES, dgc.DGCConfig(), optimizer=kind, lr=0.1)
    one.train(normals(SHAPES, 0))
    before = copy.deepcopy(one.optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        one.optimizer.load_state_dict(saved)
    torch.testing.assert_close(one.optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [("RAdam", "amsgrad"), ("NAdam", "amsgrad"), ("Adamax", "amsgrad"), ("SGD", "betas, eps, amsgrad")],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_states_of_other_optimizers_are_refused(kind, lacks, steps):
    saved = torch_run(getattr(torch.optim, kind), steps=steps, lr=0.1)[1].state_dict()
    for ours in ("AdamW", "Adam"):
        match = f"not the state of dgc.{ours} or torch.optim.{ours}: .* without {lacks}"
        assert_refused(saved, match, getattr(dgc, ours))


def test_our_optimizers_refuse_each_other_s_state():
    sgd = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9)
    sgd.train(normals(SHAPES, 0))
    assert_refused(sgd.optimizer.state_dict(), r"not the state of dgc\.AdamW .* without betas, eps, amsgrad")
    saved = adamw(SHAPES, [0]).optimizer.state_dict()
    assert_refused(saved, r"not the state of dgc\.SGD .* without momentum, nesterov", dgc.SGD)


def test_second_moments_of_amsgrad_are_refused():
    assert_refused(torch_run(amsgrad=True)[1].state_dict(), "max_exp_avg_sq|amsgrad: expected")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [torch.zeros(64), {}], ids=["another shape", "what flattening leaves"])
def test_moments_that_do_not_fit_are_refused(name, value):
    saved = torch_run()[1].state_dict()
    saved["state"][0][name] = value
    assert_refused(saved, rf"{name} of the parameter's shape, \(64, 33\), got (\(64,\)|{{}})")


def given(kind, shapes=MIXED, **settings):
    one = Alone(shapes, dgc.DGCConfig(density=0.01), optimizer=kind, **settings)
    one.train(normals(shapes, 0))
    return one


KINDS = {
    "AdamW": (dgc.AdamW, {}),
    "momentum": (dgc.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD without momentum": (dgc.SGD, {"lr": 0.1}),
    "torch's SGD": (torch.optim.SGD, {"lr": 0.1}),
}


@pytest.mark.parametrize("other", [name for name in KINDS if name != "AdamW"])
def test_what_waits_for_another_kind_of_optimizer_is_refused_and_changes_nothing(other):
    # Directions wait for AdamW, with the learning rate in them, and gradients for the others.
    adam, other = (given(KINDS[name][0], **KINDS[name][1]) for name in ("AdamW", other))
    for one, saved, match in (
        (adam, other, "expected what AdamW keeps, exp_avg, exp_avg_sq, got (momentum|nothing): .*another optimizer"),
        (other, adam, "expected what SGD keeps, (momentum|nothing), got exp_avg, exp_avg_sq: .*another optimizer"),
    ):
        memory = one.state.memory
        before = {"residual": memory.residual.clone(), **{kind: flat.clone() for kind, flat in memory.kinds.items()}}
        with pytest.raises(ValueError, match=match):
            one.state.load_state_dict(saved.state.state_dict())
        assert all(torch.equal({"residual": memory.residual, **memory.kinds}[kind], x) for kind, x in before.items())


# saved and loaded


def test_a_run_goes_on_through_a_file():
    one, other = adamw(seeds=range(4)), adamw(seeds=[9])
    file = io.BytesIO()
    torch.save([one.model.state_dict(), one.optimizer.state_dict(), one.state.state_dict()], file)
    file.seek(0)
    for part, saved in zip(
        (other.model, other.optimizer, other.state), torch.load(file, weights_only=True), strict=True
    ):
        part.load_state_dict(saved)
    for run in (one, other):
        run.train(normals(MIXED, 4))
    assert_same(one, other)
    (share,) = one.state.state_dict()["ranks"].values()
    assert share["kinds"] == ["exp_avg", "exp_avg_sq"]
    assert share["momentum"] == {}


def test_one_that_is_pickled_goes_on():
    one = adamw(seeds=range(3))
    other = copy.copy(one)
    other.model, other.optimizer, other.state = pickle.loads(pickle.dumps((one.model, one.optimizer, one.state)))
    assert other.state.optimizer is other.optimizer
    for run in (one, other):
        run.train(normals(MIXED, 3))
    assert_same(one, other)
    lone = copy.deepcopy(one.optimizer)
    assert lone.steps_of(lone.param_groups[0]["params"][0]) == 4


def test_a_dense_phase_and_back_keeps_both_moments():
    one, model = adamw(seeds=range(3), config=CONFIG), Given(MIXED)
    before = {kind: x.clone() for kind, x in one.state.memory.of("big").items()}
    waiting = one.state.memory.residual_of("big").clone()
    start = one.parameter("big").clone()
    theirs = torch.optim.AdamW([model.big], **ADAM)
    with torch.no_grad():
        model.big.copy_(start)
    theirs.state[model.big].update(step=torch.tensor(3.0), **{kind: x.clone() for kind, x in before.items()})
    one.state.dense = True
    for step in (3, 4):
        one.train(normals(MIXED, step))
        model.big.grad = normals(MIXED, step)["big"]
        theirs.step()
    assert torch.equal(one.parameter("big"), model.big)
    assert torch.equal(one.state.memory.residual_of("big"), waiting)
    one.state.dense = False
    one.train(normals(MIXED, 5))
    model.big.grad = normals(MIXED, 5)["big"]
    theirs.step()
    for kind, value in one.state.memory.of("big").items():
        torch.testing.assert_close(value, theirs.state[model.big][kind])
    one.state.set_density(0.001)
    one.train(normals(MIXED, 6))
    assert one.optimizer.steps_of(one.model.big) == 7
    assert one.state.stats.density < 0.01


# another number of ranks


def shares_of(*runs):
    """Returns the shares of several runs, as if they had been ranks of one group."""
    return [
        {"version": 2, "ranks": {str(rank): {**copy.deepcopy(own(run.state)), "rank": rank, "world_size": len(runs)}}}
        for rank, run in enumerate(runs)
    ]


@pytest.mark.parametrize("missing", [(), (0,), (1, 2)], ids=str)
def test_fewer_ranks_add_up_first_moments_and_average_second_ones(missing):
    runs = [adamw(seeds=[seed, seed + 10]) for seed in range(3)]
    there = [share for rank, share in enumerate(shares_of(*runs)) if rank not in missing]
    one = adamw()
    one.state.load_state_dict(there, allow_missing_ranks=True)
    left = [run.state.memory for rank, run in enumerate(runs) if rank not in missing]
    kept, slots = one.state.memory.of("big"), one.state.memory.slots
    weight = 1 / 3  # of each share, missing ones counting as zero
    torch.testing.assert_close(kept["exp_avg"], sum(weight * of.of("big")["exp_avg"] for of in left))
    torch.testing.assert_close(one.state.memory.residual_of("big"), sum(weight * of.residual_of("big") for of in left))
    mean = sum(of.of("big")["exp_avg_sq"] for of in left) / len(left)
    torch.testing.assert_close(kept["exp_avg_sq"], mean)
    assert slots["small"].view(one.state.memory.kinds["exp_avg_sq"]).any()


def test_a_rank_whose_share_is_missing_takes_another_s_second_moment():
    # Zeros would be divided by, for many steps, while the count of gradients goes on.
    one, memory = adamw(seeds=[0]), adamw().state.memory
    share = own(one.state)
    memory.load([(0.0, share)], share["kinds"], share["diverged"], one.state.parameters.rule.averages)
    assert torch.equal(memory.of("big")["exp_avg_sq"], one.state.memory.of("big")["exp_avg_sq"])
    assert not memory.of("big")["exp_avg"].any()
    assert not memory.residual.any()


# through torch.distributed.checkpoint


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def behind_ddp(seeds=(), **settings):
    model = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.AdamW(model.parameters(), **settings)
    config = dgc.DGCConfig(density=0.25, dense_below=10)
    state = dgc.DGCState(model.named_parameters(), optimizer, config)
    state.register(model)
    for seed in seeds:
        torch_step(model, optimizer, normals(SHAPES, seed))
    return model, optimizer, state


@pytest.mark.parametrize(
    "options",
    [{}, {"full_state_dict": True, "cpu_offload": True}, {"flatten_optimizer_state_dict": True}],
    ids=["no options", "full, on the CPU", "flat"],
)
def test_a_run_goes_on_after_a_distributed_checkpoint(one_rank, options):
    options = StateDictOptions(**options)
    model, optimizer, state = behind_ddp(range(3), **ADAM)
    other, others, other_state = behind_ddp([8], lr=0.7)
    saved = get_state_dict(model, optimizer, options=options)
    other.zero_grad()
    set_state_dict(other, others, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    other_state.load_state_dict(copy.deepcopy(state.state_dict()))
    for net, optim in ((model, optimizer), (other, others)):
        torch_step(net, optim, normals(SHAPES, 3))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert [float(s["step"]) for s in others.state.values()] == [4] * 3


def test_a_distributed_checkpoint_of_torch_adamw_brings_its_moments(one_rank):
    shapes = {"weight": (64, 33), "bias": (17,)}
    model = DistributedDataParallel(Given(shapes))
    theirs = torch.optim.AdamW(model.parameters(), **ADAM)
    torch_step(model, theirs, normals(shapes, 0))
    saved = get_optimizer_state_dict(model, theirs, options=StateDictOptions(full_state_dict=True))
    model.zero_grad()
    ours = dgc.AdamW(model.parameters(), lr=0.7)
    set_optimizer_state_dict(model, ours, saved, options=StateDictOptions(full_state_dict=True))
    taken = ours.take_moments()
    for p, state in theirs.state.items():
        assert all(torch.equal(taken[p][kind], state[kind]) for kind in ("exp_avg", "exp_avg_sq"))
