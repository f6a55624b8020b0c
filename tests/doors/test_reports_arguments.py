"""Public bug reports, numbers 14, 18 and 19: arguments as people write them, wrapped optimizers, several modules.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.models import Given, normals
from support.one_rank import CONFIG, WIDE, one, step

# 14: arguments as people write them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, opt: dgc.DGCState(net, opt), r"named_parameters: .* got Given\. Pass model\.named_parameters\(\)"),
        (lambda net, opt: dgc.DGCState(net.parameters(), opt), "named_parameters: .* got parameters without names"),
        (lambda net, opt: dgc.DGCState(dict(net.named_parameters()), opt), "named_parameters: .* got a dict"),
        (lambda net, opt: dgc.DGCState(net.a, opt), "named_parameters: .* got Parameter"),
        (lambda net, opt: dgc.DGCState(["a", "b"], opt), "named_parameters: .* got str"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), dgc.DGCConfig()), "optimizer: .* got DGCConfig"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), None), "optimizer: .* got NoneType"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt, {"density": 0.1}), "config: .* got dict"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt, 0.1), "config: .* got float"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt).register(net), "register: .* got Given"),
        (lambda net, opt: dgc.dgc_hook(None, None), "dgc_hook: expected a DGCState, got NoneType"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCConfig(), None), "dgc_hook: expected a DGCState, got DGCConfig"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), (net.a, net.a)), "python_reducer"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), net.a), "FSDP"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), net.a, net.a), "FSDP"),
    ],
)
def test_arguments_as_people_write_them(call, message):
    net = Given(WIDE)
    with pytest.raises(TypeError, match=message):
        call(net, dgc.SGD(net.parameters(), lr=0.1))


def test_shards_and_parameters_without_memory_are_refused(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(200, 100), mesh))
    lazy = nn.LazyLinear(10)
    for p, kind, message in (
        (sharded, TypeError, "w: expected a parameter sharded over its first dimension, by fully_shard, got R"),
        (nn.Parameter(torch.zeros(3, 3, device="meta")), ValueError, "w: .* meta device"),
        (lazy.weight, ValueError, "w: .* lazy module"),
    ):
        with pytest.raises(kind, match=message):
            dgc.DGCState([("w", p)], dgc.SGD([p], lr=0.1))


# 18, 19: wrapped optimizers, names, several modules


class Accelerated(torch.optim.Optimizer):
    """Holds an optimizer as accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Imitation:
    """Imitates the class of what it holds, as Lightning's and Fabric's do."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("LightningSGD", (Imitation, type(optimizer)), {})

    param_groups = property(lambda self: self._optimizer.param_groups)
    state = property(lambda self: self._optimizer.state)

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self._optimizer.zero_grad(set_to_none)


class Lookahead:
    """Is no Optimizer at all."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class Trainer:
    """Holds optimizers in a list."""

    def __init__(self, optimizer):
        self.optims = [optimizer]
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class Noam:
    """Holds it under a name of its own, as the schedulers of many tutorials do."""

    def __init__(self, optimizer):
        self.optim, self.warmup = optimizer, 100
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def test_which_of_several_optimizers_is_meant_is_asked(gloo):
    model, optimizer, _ = one()
    several = Trainer(optimizer)
    several.optims.append(torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(TypeError, match="got Trainer, which holds 2 optimizers"):
        dgc.DGCState(model.named_parameters(), several)


@pytest.mark.parametrize(
    "wrappers", [[Accelerated], [Imitation], [Lookahead], [Imitation, Accelerated], [Trainer], [Accelerated, Noam]]
)
def test_wrapped_optimizers_are_unwrapped(gloo, wrappers):
    def run(wrappers):
        model = DistributedDataParallel(Given(WIDE))
        inner = optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for wrap in wrappers:
            optimizer = wrap(optimizer)
        state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
        state.register(model)
        assert state.optimizer is inner
        for i in range(3):
            step(model, optimizer, normals(WIDE, i))
        return [p.detach() for p in model.parameters()]

    for p, q in zip(run(wrappers), run([]), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [("Adam", "Adam"), ("AdamW", "AdamW"), ("NAdam", "AdamW"), ("RAdam", "AdamW"), ("Adamax", "AdamW")],
)
def test_the_family_of_adam_is_shown_the_line_to_write(kind, ours):
    net = Given(WIDE)
    line = rf"Write optimizer = dgc\.{ours}\(model\.parameters\(\), lr=\.\.\.\), with the arguments of "
    with pytest.raises(ValueError, match=rf"got torch\.optim\.{kind}, .* {line}torch\.optim\.{ours}$"):
        dgc.DGCState(net.named_parameters(), getattr(torch.optim, kind)(net.parameters()))


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop"])
def test_optimizers_that_nobody_has_measured_are_named(kind):
    net = Given(WIDE)
    with pytest.warns(UserWarning, match=f"dgc: {kind} gets averages .* dgc.SGD and dgc.AdamW"):
        dgc.DGCState(net.named_parameters(), getattr(torch.optim, kind)(net.parameters()))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Linear(100, 100), nn.Parameter(torch.zeros(100, 100))


def test_a_submodule_may_be_called_module(gloo):
    net = Inner()
    expected = {"weight", "module.weight", "module.bias"}
    for named in (net, DistributedDataParallel(net), torch.compile(net), DistributedDataParallel(torch.compile(net))):
        state = dgc.DGCState(named.named_parameters(), dgc.SGD(net.parameters(), lr=0.1))
        assert set(state.parameters.by_name) == expected


def test_one_hook_on_one_module(gloo):
    model, optimizer, state = one()
    state.register(model)  # again: it is there
    step(model, optimizer, normals(WIDE, 0))
    assert state.step == 1
    other = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
    with pytest.raises(ValueError, match="register: expected a DDP module without a hook, got one with dgc_hook"):
        other.register(model)


def test_several_modules_and_several_optimizers_are_told_what_to_do(gloo):
    nets = [DistributedDataParallel(Given(WIDE, seed=i)) for i in range(2)]
    both = [(f"{i}.{name}", p) for i, net in enumerate(nets) for name, p in net.named_parameters()]
    state = dgc.DGCState(both, dgc.SGD([p for _, p in both], lr=0.1))
    with pytest.raises(ValueError, match="One DGCState serves one DDP module"):
        state.register(nets[0])
    with pytest.raises(ValueError, match=r"3 are missing.* gets an optimizer of its own"):
        dgc.DGCState(nets[0].named_parameters(), dgc.SGD([p for _, p in both], lr=0.1))
    with pytest.raises(ValueError, match="in groups of one optimizer"):
        dgc.DGCState(nets[0].named_parameters(), dgc.SGD([nets[0].module.a], lr=0.1))
    with pytest.raises(ValueError, match=r"register: expected a DGCState made of all .* not of b, bias"):
        dgc.DGCState([("a", nets[0].module.a)], dgc.SGD([nets[0].module.a], lr=0.1)).register(nets[0])
