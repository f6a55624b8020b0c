"""A run whose model changes under way, through any door, and the account of every gradient there was.

SGD without momentum, with lr 1, and gradients of small integers, so that all sums are exact: what has moved the
weights, what waits, and what has gone on request are together what all ranks were given, to the bit.
"""

import copy

import torch
from torch import nn

import dgc
from support.models import integers, normals
from support.training import seed_of

SHAPES = {"a": (200, 100), "b": (130, 130), "bias": (50,)}
GROWN = {"c": (100, 90)}
CONFIG = dgc.DGCConfig(density=1 / 64, dense_below=1000)
SETTINGS = {"lr": 1.0, "momentum": 0.0}
STEPS = 28
NUMBERS = torch.cat([torch.arange(10000), torch.arange(1, 10001)]).view(SHAPES["a"])  # no two shards with one mask


class Layer(nn.Module):
    """One parameter, whose gradient is the input."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, gradient):
        return (self.weight * gradient).sum()


class Layers(nn.Module):
    """Layers by name; forward(g).backward() adds g[name] to every .grad."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        for name, start in integers(shapes, 0).items():
            self.add_module(name, Layer(start))

    def forward(self, gradients):
        return torch.stack([layer(gradients.get(name, torch.zeros(()))) for name, layer in self.named_children()]).sum()


def full(tensor):
    """Returns a copy of a whole parameter, also of one that is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def save(run):
    """Returns a copy of all that training changes."""
    return copy.deepcopy([part.state_dict() for part in (run.net, run.optimizer, run.state)])


def load(run, saved):
    """Goes back to where save() was called."""
    for part, state in zip((run.net, run.optimizer, run.state), copy.deepcopy(saved), strict=True):
        part.load_state_dict(state)


class Account:
    """What one rank was given, and what it has dropped, by layer."""

    def __init__(self, run):
        self.run = run
        self.start = {name: full(layer.weight) for name, layer in run.net.named_children()}
        self.given = {name: torch.zeros(shape) for name, shape in {**SHAPES, **GROWN}.items()}
        self.gone = {}  # this rank's part, flat
        self.moved = {}
        self.alive = torch.ones(SHAPES["a"], dtype=torch.bool)
        self.forgotten = 0

    def waits(self, name):
        residual = self.run.state.memory.residual_of(f"{name}.weight")
        return None if residual is None else residual.flatten().clone()

    def drop(self, name, dropped):
        self.gone[name] = self.gone.get(name, 0) + dropped

    def mask(self, alive):
        """Masks layer a, and compares the report with what has gone."""
        before = self.waits("a")
        report = self.run.state.mask("a.weight", alive)
        gone = before - self.waits("a")
        if alive is None:
            assert report is None
            assert not gone.any()
        else:
            assert report.entries == int((gone != 0).sum())
            norm = float(torch.linalg.vector_norm(gone, dtype=torch.float64))
            assert report.norms == ({"residual": norm} if gone.any() else {})
            self.forgotten += report.entries
        assert self.run.state.stats.forgotten == self.forgotten
        self.drop("a", gone)
        self.alive = torch.ones_like(self.alive) if alive is None else alive

    def rebind(self, leaves=None, **back):
        """Rebinds, and compares what is left behind with what waited."""
        before = None if leaves is None else self.waits(leaves)
        left = self.run.rebind(**back)
        assert list(left) == ([] if leaves is None or not before.any() else [f"{leaves}.weight"])
        for kinds in left.values():
            assert list(kinds) == ["residual"]
            assert torch.equal(kinds["residual"].flatten(), before)
        return left

    def leave(self, name):
        """Takes note of a layer that is removed."""
        self.moved[name] = self.start[name] - full(self.run.net.get_submodule(name).weight)
        self.drop(name, self.waits(name))

    def save(self):
        return save(self.run), copy.deepcopy((self.given, self.gone))

    def rewind(self, saved):
        load(self.run, saved[0])
        self.given, self.gone = copy.deepcopy(saved[1])

    def result(self):
        layers = dict(self.run.net.named_children())
        waits = {name: waiting for name in layers if (waiting := self.waits(name)) is not None}
        parameters = {name: full(layer.weight) for name, layer in layers.items()}
        moved = {**self.moved, **{name: self.start[name] - p for name, p in parameters.items()}}
        return {"parameters": parameters, "moved": moved, "given": self.given, "waits": waits, "gone": self.gone}


def change(run, rank, prepare=lambda layer: None):
    """Freezes, prunes, grows, unfreezes, rewinds and removes on the way; returns the account of this rank.

    Args:
        run: of Layers(), with CONFIG and SETTINGS, and a method rebind().
        rank: chooses the gradients.
        prepare: what a new layer needs.
    """
    net, optimizer = run.net, run.optimizer
    account = Account(run)
    frozen, saved, shift = {}, None, 0
    for i in range(STEPS):
        if i == 3:
            net.b.weight.requires_grad_(False)
            frozen = account.rebind(leaves="b")
        elif i in (6, 12):  # prune; another set, some of which had died
            account.mask(NUMBERS % 4 == 0 if i == 6 else NUMBERS % 4 < 2)
        elif i == 9:
            net.c = Layer(torch.zeros(GROWN["c"]))
            prepare(net.c)
            optimizer.add_param_group({"params": [net.c.weight]})
            account.start["c"] = torch.zeros(GROWN["c"])
            account.mask(None)
            account.rebind()
            account.mask(NUMBERS % 4 == 1)
        elif i == 15:
            net.b.weight.requires_grad_(True)
            account.mask(None)
            account.rebind(back=frozen)
        elif i == 18:
            saved = account.save()
        elif i == 21:
            account.rewind(saved)
            assert run.state.step == 18
            shift = 100  # other gradients than the first time
        elif i == 24:
            account.leave("c")
            del net.c
            optimizer.param_groups.pop()
            account.rebind(leaves="c")
        live = {name: {**SHAPES, **GROWN}[name] for name, layer in net.named_children() if layer.weight.requires_grad}
        gradients = {name: 6 * g for name, g in integers(live, seed_of(i + shift, rank)).items()}
        for name, g in gradients.items():
            account.given[name] += g * account.alive if name == "a" else g
        run.train(gradients)
    assert run.state.step == STEPS - 3
    assert account.forgotten > 1000
    return account.result()


def assert_nothing_lost(results, places=1):
    """Compares what ranks were given with what became of it.

    Args:
        results: of change(), by rank.
        places: ranks of a node, which are one worker and divide what waits by rows.
    """
    workers = len(results) // places
    for name in (*SHAPES, *GROWN):
        moved = workers * results[0]["moved"][name].double()
        given = sum(result["given"][name].double() for result in results) / places
        kept = 0
        for kind in ("waits", "gone"):
            if all(name not in result[kind] for result in results):
                continue
            parts = [result[kind][name].double() for result in results]
            nodes = [torch.cat(parts[i : i + places]) for i in range(0, len(parts), places)]
            kept = kept + sum(nodes).view(given.shape)
        assert torch.equal(moved + kept, given), name
    gone = [sum(float(result["gone"][name].abs().sum()) for result in results) for name in ("a", "c")]
    assert min(gone) > 0, "expected something to go"
    assert all(result["gone"].keys() == {"a", "c"} for result in results)


# Rewinding.

REWOUND = dgc.DGCConfig(density=1 / 256, warmup_steps=8, dense_below=1000)
OPTIMIZERS = {
    dgc.SGD: {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.25},
    dgc.AdamW: {"lr": 0.01, "weight_decay": 0.25},
}


def standing(run):
    """Returns copies of all that a run is made of, by name."""
    memory = run.state.memory
    found = {"step": run.state.step, "density": run.state.density, "v": memory.residual, **memory.kinds}
    for name, p in run.net.named_parameters():
        found[name] = p
        found |= {f"{name} {kind}": value for kind, value in run.optimizer.state.get(p, {}).items()}
    return {name: full(value) if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def differing(one, other):
    """Returns the names of what differs in a bit."""
    assert one.keys() == other.keys()
    same = {n: torch.equal(a, other[n]) if isinstance(a, torch.Tensor) else a == other[n] for n, a in one.items()}
    return [name for name, equal in same.items() if not equal]


def rewind(run, rank):
    """Trains in a warm-up, goes back, and trains again; returns what the run was made of at four times."""

    def train(steps):
        for i in steps:
            run.train(normals(SHAPES, seed_of(i, rank)))

    train(range(4))
    saved, times = save(run), {"saved": standing(run)}
    train(range(4, 9))
    times["end"] = standing(run)
    load(run, saved)
    times["back"] = standing(run)
    train(range(4, 9))
    times["again"] = standing(run)
    return times


def assert_rewound(times):
    assert differing(times["saved"], times["back"]) == []
    assert differing(times["end"], times["again"]) == []
    changed = differing(times["saved"], times["end"])
    assert {"step", "density", "v", "a.weight"} <= set(changed)
    assert (times["back"]["step"], times["again"]["step"]) == (4, 9)
    assert times["again"]["density"] == 1 / 256 < times["back"]["density"]
    assert times["back"]["v"].any()
