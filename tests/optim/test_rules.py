"""Rules in plain PyTorch: momentum has the fused op's bits, and one that keeps three tensors works throughout."""

import copy

import pytest
import torch
from torch import Tensor

import dgc
from dgc import ops
from dgc.ops import Accumulation
from dgc.optim.apply import subtract
from dgc.optim.base import DGCOptimizer
from dgc.optim.sgd import MomentumCorrection
from dgc.optim.unfused import Unfused
from support.alone import reduce
from support.models import Given, normals
from support.ranks import run_ranks

SHAPES = {"big": (300, 300), "other": (200, 100), "small": (20, 20), "bias": (300,)}
KINDS = ("first", "second", "third")
LR = 0.25


class PlainMomentum(Unfused, MomentumCorrection):
    """dgc.SGD's rule, in plain PyTorch."""

    fused = False

    def advance(self, kept, gradient, factors):
        u = kept["momentum"] * torch.tensor(factors[0], dtype=torch.float32) + gradient
        return {"momentum": u}, u

    def compress(self, work):
        Unfused.compress(self, work)


class PlainSGD(dgc.SGD):
    def rule(self):
        return PlainMomentum(self)


def three(kept: dict[str, Tensor], h: Tensor, beta: float) -> tuple[dict[str, Tensor], Tensor]:
    """The rule with three tensors: a mean, a mean of squares and a sum."""
    first = beta * kept["first"] + (1 - beta) * h
    second = beta * kept["second"] + (1 - beta) * h * h
    third = 0.5 * kept["third"] + h
    return {"first": first, "second": second, "third": third}, first / (second.sqrt() + 1e-3) + third


class ThreeRule(Unfused):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    kept = KINDS
    keeps_state = True

    def factors(self, parameter, group, workers):
        self.workers = workers  # of the last pass, for the test to see
        return (group["beta"],)

    def check(self):
        pass

    def check_use(self, *, loss_scaling, skipping):
        pass

    def attach(self, reducer):
        self.optimizer.attach(reducer)

    def serves(self, reducer):
        return self.optimizer.reducer is reducer

    def advance(self, kept, gradient, factors):
        return three(kept, gradient, factors[0])


class Three(DGCOptimizer):
    """Applies the average update; for a plain average it advances the three tensors itself."""

    def __init__(self, params, lr=LR, beta=0.75):
        super().__init__(params, {"lr": lr, "beta": beta})

    def rule(self):
        return ThreeRule(self)

    @torch.no_grad()
    def step(self):
        if not self.reducer.take():
            return
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if (kept := self.reducer.kept_of(p)) is not None:
                    after, update = three(kept, p.grad, group["beta"])
                    for kind in KINDS:
                        kept[kind].copy_(after[kind])
                p.sub_(update, alpha=group["lr"])


class Run:
    """One rank without DDP, with any optimizer of dgc's."""

    def __init__(self, optimizer, config=None, **arguments):
        self.model = Given(SHAPES)
        self.optimizer = optimizer(self.model.parameters(), **arguments)
        self.state = dgc.DGCState(
            self.model.named_parameters(), self.optimizer, config or dgc.DGCConfig(density=0.01, momentum_masking=True)
        )

    def backward(self, gradients):
        self.optimizer.zero_grad()
        self.model(gradients).backward()
        reduce(self.state, self.model)

    def train(self, gradients):
        self.backward(gradients)
        self.optimizer.step()

    def tensors(self):
        memory = self.state.memory
        found = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return found | {"v": memory.residual.clone()} | {k: t.clone() for k, t in memory.kinds.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("masking", "decay"), [(True, 1.0), (False, 1.0), (True, 0.9)])
def test_momentum_in_plain_pytorch_has_the_fused_bits(masking, decay):
    config = dgc.DGCConfig(density=0.01, momentum_masking=masking, residual_decay=decay, clip_norm=5.0)
    fused = Run(dgc.SGD, config, lr=LR, momentum=0.9)
    plain = Run(PlainSGD, config, lr=LR, momentum=0.9)
    for step in range(6):
        gradients = normals(SHAPES, step)
        if step == 2:
            gradients["big"][3, 5] = torch.inf
            for run in (fused, plain):
                with pytest.raises(FloatingPointError, match="big on rank 0"):
                    run.train(gradients)
            continue
        if step == 4:
            gradients["big"].zero_()  # unused in this pass: what was sent of its momentum comes back
        fused.train(gradients)
        plain.train(gradients)
        assert_same(fused.tensors(), plain.tensors())


def test_three_tensors_follow_their_equations():
    run = Run(Three)
    expected = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    kept = {n: {kind: torch.zeros(shape) for kind in KINDS} for n, shape in SHAPES.items()}
    v = {name: torch.zeros(SHAPES[name]) for name in ("big", "other")}
    for step in range(5):
        gradients = normals(SHAPES, step)
        run.train(gradients)
        for name, g in gradients.items():
            kept[name], update = three(kept[name], g, 0.75)
            if name in v:
                v[name] += update
                chosen = v[name].abs().flatten().topk(-(-v[name].numel() // 100)).indices
                sent = torch.zeros_like(v[name])
                sent.view(-1)[chosen] = v[name].view(-1)[chosen]
                v[name] -= sent
                for kind in KINDS:
                    kept[name][kind].view(-1)[chosen] = 0
                update = sent
            expected[name].sub_(update, alpha=LR)
        for name in SHAPES:
            assert torch.equal(run.model.get_parameter(name).detach(), expected[name]), (step, name)
            for kind, tensor in run.state.memory.of(name).items():
                assert torch.equal(tensor, kept[name][kind]), (step, name, kind)


def test_three_tensors_are_given_back_dropped_saved_and_averaged():
    run = Run(Three, dgc.DGCConfig(density=0.01, momentum_masking=True, droppable=True))
    for step in range(3):
        run.train(normals(SHAPES, step))
    before = run.tensors()
    run.backward(normals(SHAPES, 7))
    run.state.discard(drop_gradient=True)
    assert_same(run.tensors(), before)

    # Without dropping, the gradient is in what is kept, and what was sent is back.
    run.backward(normals(SHAPES, 8))
    run.state.discard(drop_gradient=False)
    name = "big"
    after, update = three(
        {kind: run.state.memory.slots[name].view(before[kind]) for kind in KINDS}, normals(SHAPES, 8)[name], 0.75
    )
    for kind in KINDS:
        assert torch.equal(run.state.memory.of(name)[kind], after[kind]), kind
    v = run.state.memory.slots[name].view(before["v"]) + update
    assert torch.equal(run.state.memory.residual_of(name), v)

    saved = copy.deepcopy(run.state.state_dict())
    (share,) = saved["ranks"].values()
    assert share["kinds"] == list(KINDS)
    assert share["momentum"] == {}
    other = Run(Three)
    other.model.load_state_dict(run.model.state_dict())
    other.state.load_state_dict(saved)
    for step in (9, 10):
        run.train(normals(SHAPES, step))
        other.train(normals(SHAPES, step))
    assert_same(run.tensors(), other.tensors())


def both_ranks(rank, world_size):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Given(SHAPES), find_unused_parameters=True)
    optimizer = Three(model.parameters())
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01))
    state.register(model)
    for step in range(8):
        if step == 5:
            state.dense = True  # what the rule keeps differs between ranks now, and is averaged once
        optimizer.zero_grad()
        model(normals(SHAPES, 10 * step + rank)).backward()
        optimizer.step()
    assert state.parameters.rule.workers == 2
    kinds = {kind: tensor.clone() for kind, tensor in state.memory.kinds.items()}
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}, kinds, sorted(state.memory.diverged)


def test_replicas_stay_equal_with_three_tensors_and_a_dense_phase_averages_them():
    (one, kinds, diverged), (other, others, _) = run_ranks(2, both_ranks)
    assert_same(one, other)
    assert_same(kinds, others)
    assert diverged == []


def other_numbers(rank, world_size):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Given(SHAPES))
    state = dgc.DGCState(model.named_parameters(), Three(model.parameters(), beta=0.75 - 0.5 * rank))
    with pytest.raises(ValueError, match=r"numbers of the rule by group: rank 0 has \[\(0\.75,\)\], rank 1 has"):
        state.register(model)


def test_ranks_compare_a_rule_s_numbers():
    run_ranks(2, other_numbers)


def test_what_another_rule_has_saved_is_refused_and_changes_nothing():
    momentum, run = Run(dgc.SGD, lr=LR, momentum=0.9), Run(Three)
    momentum.train(normals(SHAPES, 0))
    run.train(normals(SHAPES, 1))
    before = run.tensors()
    with pytest.raises(ValueError, match="expected what Three keeps, first, second, third, got momentum"):
        run.state.load_state_dict(momentum.state.state_dict())
    assert_same(run.tensors(), before)
    run.train(normals(SHAPES, 2))
    # An optimizer that keeps nothing takes what waits, and no more.
    plain = Given(SHAPES)
    state = dgc.DGCState(plain.named_parameters(), torch.optim.SGD(plain.parameters(), lr=LR), momentum.state.config)
    state.load_state_dict(momentum.state.state_dict())
    assert torch.equal(state.memory.residual, momentum.state.memory.residual)
    assert state.memory.kinds == {}


def test_an_optimizer_without_a_rule_is_named():
    class Ruleless(DGCOptimizer):
        pass

    model = Given(SHAPES)
    with pytest.raises(NotImplementedError, match=r"Ruleless\.rule: expected a method that returns a .*Rule"):
        dgc.DGCState(model.named_parameters(), Ruleless(model.parameters(), {}))


class FusedAdamRule(ThreeRule):
    """Adam's direction in one op, with numbers that change from pass to pass."""

    fused, kept = True, ("m", "s")
    passes, seen = 0, ()

    def check(self):
        self.passes += 1

    def factors(self, parameter, group, workers):
        return 0.25, 0.75, 0.25, 0.0, 1 / self.passes, 1.0 + parameter.dim(), 1e-3

    def compress(self, work):
        self.seen = work
        kept = [work.kinds["m"], work.kinds["s"]]
        rest = (work.scale, work.selection, work.workspace, work.sent.get("m"), work.dtype)
        ops.compress_(work.gradients, Accumulation.ADAM, kept, work.residual, work.receiving.table, work.numbers, *rest)


class FusedAdam(Three):
    def rule(self):
        return FusedAdamRule(self)

    def step(self):
        self.reducer.take()


def test_numbers_are_written_where_they_have_changed():
    run = Run(FusedAdam)
    rule = run.state.parameters.rule
    for step in range(3):
        run.train(normals(SHAPES, step))
        numbers, factors = rule.seen.numbers, rule.seen.factors
        assert factors[0][4] == 1 / rule.passes
        # What is wrong stays wrong, unless it is written again.
        expected = torch.tensor([(1.0, *own) for own in factors], dtype=torch.float32).T
        if step:
            expected[2] = 0.5
        assert torch.equal(numbers, expected)
        numbers[2] = 0.5


@pytest.mark.parametrize("masking", [True, False])
def test_a_fused_rule_masks_its_first_tensor_and_gives_it_back(masking):
    run = Run(FusedAdam, dgc.DGCConfig(density=0.01, momentum_masking=masking))
    name, gradient = "big", normals(SHAPES, 0)["big"]
    run.backward(normals(SHAPES, 0))
    m, s = 0.25 * gradient, 0.25 * gradient * gradient
    kept = {kind: tensor.clone() for kind, tensor in run.state.memory.of(name).items()}
    torch.testing.assert_close(kept["s"], s)
    assert (kept["m"] == 0).sum() == masking * 900
    run.state.discard(drop_gradient=False)
    torch.testing.assert_close(run.state.memory.of(name)["m"], m)
    assert torch.equal(run.state.memory.of(name)["s"], kept["s"])
    assert list(run.state.memory.kinds) == ["m", "s"]


@pytest.mark.parametrize("form", ["float32", "float64", "with gaps"])
def test_subtract_shrinks_in_one_op_or_tensor_by_tensor(form):
    p, update = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    if form == "float64":
        p, update = p.double(), update.double()
    elif form == "with gaps":
        p, update = p.T, update.T
    expected = 0.5 * p - 0.25 * update
    for skip, right in ((torch.ones(1, dtype=torch.uint8), p.clone()), (torch.zeros(1, dtype=torch.uint8), expected)):
        subtract([p], [update], 0.25, skip, shrink=0.5)
        assert torch.equal(p, right)
    subtract([p], [update], 0.25, None, shrink=0.5)
    assert torch.equal(p, 0.5 * expected - 0.25 * update)
