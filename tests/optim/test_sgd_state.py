"""dgc.SGD's state: from and to torch.optim.SGD, of earlier versions, and through torch.distributed.checkpoint."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import Alone
from support.models import Given, normals
from support.ranks import run_ranks

SHAPES = {"weight": (64, 33), "bias": (17,), "scalar": ()}
EVERYTHING = dgc.DGCConfig(density=1.0)


def torch_run(steps=5, **sgd):
    """Returns a model and its torch.optim.SGD after some dense steps."""
    model = Given(SHAPES)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    for step in range(steps):
        torch_step(model, optimizer, normals(SHAPES, step))
    return model, optimizer


def torch_step(model, optimizer, gradients):
    optimizer.zero_grad()
    model(gradients).backward()
    optimizer.step()


def values(state_dict):
    return {i: {name: value.tolist() for name, value in s.items()} for i, s in state_dict["state"].items()}


# from torch.optim.SGD, and to it


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_dense_run_goes_on_with_the_bits_of_torch_sgd(momentum, nesterov, weight_decay):
    sgd = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": weight_decay}
    model, theirs = torch_run(**sgd)
    ours = Alone(SHAPES, EVERYTHING, lr=1.0, momentum=0.5)
    ours.model.load_state_dict(model.state_dict())
    ours.optimizer.load_state_dict(theirs.state_dict())  # which goes on: its buffers are its own
    for step in range(5, 25):
        ours.train(normals(SHAPES, step))
        torch_step(model, theirs, normals(SHAPES, step))
        for name, p in model.named_parameters():
            if weight_decay:
                assert float((ours.parameter(name) - p.detach()).norm() / p.detach().norm()) < 1e-6
            else:
                assert torch.equal(ours.parameter(name), p)


def test_momentum_of_a_dense_run_waits_until_it_is_taken():
    model, theirs = torch_run(lr=0.1, momentum=0.9)
    optimizer = dgc.SGD(model.parameters(), lr=1.0)
    optimizer.load_state_dict(theirs.state_dict())
    again = dgc.SGD(model.parameters(), lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    buffers = {p: s["momentum_buffer"] for p, s in theirs.state.items()}
    for one in (optimizer, again):
        taken = one.take_momentum()
        assert taken.keys() == buffers.keys()
        assert all(torch.equal(taken[p], buffer) for p, buffer in buffers.items())
        assert one.take_momentum() == {}
        assert values(one.state_dict()) == {i: {"step": 0, "decay_momentum": []} for i in range(3)}
        assert (one.param_groups[0]["lr"], one.steps) == (0.1, 0)


def test_buffers_that_are_none_are_none():
    model, theirs = torch_run(lr=0.1, momentum=0.9)
    theirs.state[model.bias]["momentum_buffer"] = None
    optimizer = dgc.SGD(model.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    assert set(optimizer.take_momentum()) == {model.weight, model.scalar}


def test_a_state_of_dgc_steps_in_torch_sgd():
    ours = Alone(SHAPES, dgc.DGCConfig(), lr=0.25, momentum=0.5, weight_decay=0.125)
    for step in range(3):
        ours.train(normals(SHAPES, step))
    model = copy.deepcopy(ours.model)
    theirs = torch.optim.SGD(model.parameters(), lr=1.0)
    theirs.load_state_dict(ours.optimizer.state_dict())
    g, before = normals(SHAPES, 3), {name: p.detach().clone() for name, p in model.named_parameters()}
    torch_step(model, theirs, g)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.25 * (g[name] + 0.125 * before[name]))
    assert theirs.param_groups[0]["momentum"] == 0.5


def test_groups_and_defaults_are_those_of_torch_sgd():
    ours, theirs = (kind(Given(SHAPES).parameters(), lr=0.1, foreach=True) for kind in (dgc.SGD, torch.optim.SGD))
    assert ours.defaults == theirs.defaults
    without = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (ours, theirs)]
    assert without[0] == without[1]


def test_a_scheduler_leaves_its_keys_in_groups_that_load():
    optimizer = dgc.SGD(Given(SHAPES).parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)
    saved = optimizer.state_dict()
    other = dgc.SGD(Given(SHAPES).parameters(), lr=0.3)
    other.load_state_dict(saved)
    assert other.param_groups[0]["initial_lr"] == saved["param_groups"][0]["initial_lr"] == pytest.approx(0.02)


# what is refused


def assert_refused(saved, match):
    one = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9, weight_decay=0.1)
    one.train(normals(SHAPES, 0))
    before = copy.deepcopy(one.optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        one.optimizer.load_state_dict(saved)
    torch.testing.assert_close(one.optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [(torch.optim.Adam, "momentum, nesterov"), (torch.optim.RMSprop, "nesterov"), (torch.optim.Adagrad, "momentum")],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_states_of_other_optimizers_are_refused(kind, lacks, steps):
    model = Given(SHAPES)
    optimizer = kind(model.parameters(), lr=0.1)
    for step in range(steps):
        torch_step(model, optimizer, normals(SHAPES, step))
    assert_refused(optimizer.state_dict(), f"not the state of dgc.SGD or torch.optim.SGD: .* without {lacks}")


def test_the_state_of_muon_is_refused():
    # Its groups have all that dgc.SGD's used to have, and its momentum_buffer is a mean.
    saved = torch_run(lr=0.1, momentum=0.9)[1].state_dict()
    for name in ("dampening", "maximize", "differentiable"):
        del saved["param_groups"][0][name]
    assert_refused(saved, "without dampening")


def test_state_of_another_optimizer_in_groups_that_fit_is_refused():
    model = Given(SHAPES)
    adam = torch.optim.Adam(model.parameters())
    torch_step(model, adam, normals(SHAPES, 0))
    saved = {**torch_run(lr=0.1)[1].state_dict(), "state": adam.state_dict()["state"]}
    assert_refused(saved, "got exp_avg, exp_avg_sq")


@pytest.mark.parametrize("name", ["momentum_buffer", "decay_momentum"])
@pytest.mark.parametrize("value", [torch.zeros(64), {}], ids=["another shape", "what flattening leaves"])
def test_momentum_that_does_not_fit_is_refused(name, value):
    saved = torch_run(lr=0.1, momentum=0.9)[1].state_dict()
    saved["state"][0][name] = value
    assert_refused(saved, rf"{name} of the parameter's shape, \(64, 33\), got (\(64,\)|{{}})")


def test_a_step_that_is_no_number_is_refused():
    saved = torch_run(lr=0.1, momentum=0.9)[1].state_dict()
    saved["state"][1]["step"] = {}
    assert_refused(saved, "expected a number as step, got {}")


def test_state_of_no_parameter_is_refused():
    saved = torch_run(lr=0.1, momentum=0.9)[1].state_dict()
    saved["state"][17] = {"step": torch.tensor(1.0)}
    assert_refused(saved, "got 17")


# of earlier versions


def earlier(state_dict):
    """Returns a state as it was saved when only the first parameter had a step, and groups four settings."""
    state = {i: {"decay_momentum": s["decay_momentum"]} for i, s in state_dict["state"].items()}
    state[0]["step"] = state_dict["state"][0]["step"]
    kept = ("lr", "momentum", "weight_decay", "nesterov", "params")
    return {"state": state, "param_groups": [{k: g[k] for k in kept} for g in state_dict["param_groups"]]}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_state_of_an_earlier_version_goes_on_bit_for_bit(weight_decay):
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay}
    straight, resumed = Alone(SHAPES, EVERYTHING, **sgd), Alone(SHAPES, EVERYTHING, lr=1.0)
    for step in range(7):
        straight.train(normals(SHAPES, step))
    saved = earlier(straight.optimizer.state_dict())
    if not weight_decay:
        saved["state"] = {0: {"step": saved["state"][0]["step"]}}
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.optimizer.load_state_dict(saved)
    resumed.state.load_state_dict(copy.deepcopy(straight.state.state_dict()))
    assert [s["step"].item() for s in resumed.optimizer.state.values()] == [7, 7, 7]
    for one in (straight, resumed):
        one.train(normals(SHAPES, 7))
    assert_same(straight, resumed)
    assert resumed.optimizer.steps == 8
    assert resumed.optimizer.param_groups[0]["maximize"] is False


def assert_same(one, other):
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert values(one.optimizer.state_dict()) == values(other.optimizer.state_dict())


def test_an_optimizer_pickled_by_an_earlier_version_gets_what_it_lacks():
    one = Alone(SHAPES, EVERYTHING, lr=0.1, momentum=0.9)
    one.train(normals(SHAPES, 0))
    for settings in (one.optimizer.defaults, one.optimizer.param_groups[0]):
        for name in ("dampening", "maximize", "foreach", "differentiable", "fused"):
            del settings[name]
    optimizer = pickle.loads(pickle.dumps(one.optimizer))
    assert optimizer.param_groups[0]["dampening"] == optimizer.defaults["dampening"] == 0
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()


# through torch.distributed.checkpoint


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A model behind DDP with a group for weights and one for the rest, whose optimizer saves itself by DCP."""

    def __init__(self, seed=0, rank=0, decays=(0.0, 0.0), **sgd):
        self.rank = rank
        self.model = DistributedDataParallel(Given(SHAPES, seed=seed))
        net = self.model.module
        groups = [{"params": [net.weight]}, {"params": [net.bias, net.scalar]}]
        self.optimizer = dgc.SGD([{**g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)], **sgd)
        config = dgc.DGCConfig(density=0.25, dense_below=10)
        self.state = dgc.DGCState(self.model.named_parameters(), self.optimizer, config)
        self.model.register_comm_hook(self.state, dgc.dgc_hook)

    def train(self, *seeds):
        for seed in seeds:
            self.optimizer.zero_grad()
            self.model(normals(SHAPES, 100 * self.rank + seed)).backward()
            self.optimizer.step()

    def set(self, saved, options=None):
        model, optimizer = saved
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)

    def go_on_as(self, other, at):
        """Compares with another run, whose model and optimizer have been taken over, and one step later."""
        self.state.load_state_dict(copy.deepcopy(other.state.state_dict()))
        assert_same(self, other)
        assert self.optimizer.steps == at
        assert self.optimizer.state_dict()["param_groups"] == other.optimizer.state_dict()["param_groups"]
        for one in (self, other):
            one.train(at)
        assert_same(self, other)
        assert self.optimizer.steps == at + 1


SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay of some": {"momentum": 0.9, "decays": (0.1, 0.0)},
    "nesterov, decay of all": {"momentum": 0.9, "nesterov": True, "decays": (0.1, 0.2)},
}
OPTIONS = {
    "no options": {},
    "full": {"full_state_dict": True},
    "on the CPU": {"cpu_offload": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sgd", SETTINGS.values(), ids=SETTINGS)
def test_a_run_goes_on_after_a_checkpoint(one_rank, sgd, options, stepped):
    options = StateDictOptions(**options)
    one, other = Run(lr=0.1, **sgd), Run(seed=1, lr=0.7, **sgd)
    one.train(0, 1, 2)
    other.train(*([7, 8] if stepped else []))
    other.set(get_state_dict(one.model, one.optimizer, options=options), options)
    other.go_on_as(one, at=3)


def test_a_run_goes_on_after_a_checkpoint_before_its_first_step(one_rank):
    one, other = Run(lr=0.1, momentum=0.9), Run(seed=1, lr=0.7)
    other.set(get_state_dict(one.model, one.optimizer))
    other.go_on_as(one, at=0)


def test_a_checkpoint_is_written_and_read(one_rank, tmp_path):
    sgd = {"momentum": 0.9, "decays": (0.1, 0.0)}
    one, other = Run(lr=0.1, **sgd), Run(lr=0.7, **sgd)
    one.train(0, 1, 2)
    dcp.save(get_optimizer_state_dict(one.model, one.optimizer), checkpoint_id=tmp_path)
    read = get_optimizer_state_dict(other.model, other.optimizer)
    dcp.load(read, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other.model, other.optimizer, read)
    assert values(other.optimizer.state_dict()) == values(one.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}], ids=["no options", "full"])
def test_a_checkpoint_of_torch_sgd_brings_its_momentum(one_rank, options):
    options = StateDictOptions(**options)
    shapes = {"weight": (64, 33), "bias": (17,)}  # torch raises a KeyError for momentum of a scalar, full
    model = DistributedDataParallel(Given(shapes))
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch_step(model, theirs, normals(shapes, 0))
    ours = dgc.SGD(model.parameters(), lr=0.7)
    saved = get_optimizer_state_dict(model, theirs, options=options)
    model.zero_grad()
    set_optimizer_state_dict(model, ours, saved, options=options)
    taken = ours.take_momentum()
    assert len(taken) == 2
    assert all(torch.equal(taken[p], normals(shapes, 0)[n]) for n, p in model.module.named_parameters())


def test_a_flat_checkpoint_of_torch_sgd_is_refused(one_rank):
    # torch reads no more of it than this optimizer has, and would leave the momentum out.
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = DistributedDataParallel(Given(SHAPES))
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch_step(model, theirs, normals(SHAPES, 0))
    saved = get_optimizer_state_dict(model, theirs, options=options)
    model.zero_grad()
    with pytest.raises(ValueError, match="expected a number as step"):
        set_optimizer_state_dict(model, dgc.SGD(model.parameters()), saved, options=options)


def broadcast_checkpoint(rank, world_size):
    sgd = {"rank": rank, "momentum": 0.9, "nesterov": True, "decays": (0.1, 0.0)}
    one, other = Run(lr=0.1, **sgd), Run(seed=1, lr=0.7, **sgd)
    one.train(0, 1, 2)
    # Of torch's functions, set_state_dict() does not broadcast a model to a rank that has nothing of it.
    model, optimizer = get_state_dict(
        one.model, one.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    assert bool(optimizer) == (rank == 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other.model, model, options=options)
    set_optimizer_state_dict(other.model, other.optimizer, optimizer, options=options)
    other.go_on_as(one, at=3)
    return [p.detach() for p in other.model.parameters()]


def test_two_ranks_go_on_after_a_checkpoint_that_one_of_them_reads():
    results = run_ranks(2, broadcast_checkpoint)
    for p, q in itertools.zip_longest(*results):
        assert torch.equal(p, q)
