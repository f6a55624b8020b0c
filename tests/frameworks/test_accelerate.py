"""dgc.accelerate on real Accelerate: the bits of the three lines, checkpoints, and each wrong use."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.messages import error_of
from support.ranks import run_ranks
from support.torchrun import pretend
from support.training import assert_equal, assert_replicas_equal, outcome

if find_spec("accelerate") is None:  # each rank imports it, and not each process that collects tests
    reason = "NOT TESTED: dgc.accelerate, since Accelerate is not installed: '.[accelerate]'"
    pytest.skip(reason, allow_module_level=True)

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,), clip_norm=1.0, dense_below=100)
SETTINGS = {"lr": 0.05, "momentum": 0.9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 4))


def batch(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 20, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model, step, rank):
    x, y = batch(step, rank)
    return nn.functional.cross_entropy(model(x), y)


def by_hand(rank, steps):
    """Steps of two batches each."""
    net = network()
    model = DistributedDataParallel(net)
    optimizer = dgc.SGD(model.parameters(), **SETTINGS)
    state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
    state.register(model)
    for step in range(steps):
        with model.no_sync():
            (loss_of(model, 2 * step, rank) / 2).backward()
        (loss_of(model, 2 * step + 1, rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(net, state)


class Run:
    """A run by Accelerate, with gradient accumulation."""

    def __init__(self, attach=True, scaler=None):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.accelerator.scaler = scaler  # Accelerate makes one for float16, and float16 on a GPU only
        self.net = network()
        optimizer = torch.optim.SGD(self.net.parameters(), **SETTINGS)
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        if attach:
            self.attach()

    def attach(self, **settings):
        import dgc.accelerate

        dgc.accelerate.attach(self.accelerator, self.model, self.optimizer, CONFIG, **settings)

    def train(self, rank, steps):
        for i in range(2 * steps.start, 2 * steps.stop):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, i, rank))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def result(self):
        return outcome(self.net, self.optimizer.dgc)


def misuse(run, rank, folder):
    import dgc.accelerate

    bare = torch.optim.SGD(run.net.parameters(), lr=0.1)
    run.accelerator.backward(loss_of(run.model, 0, rank))
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), float("inf"))
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    errors = {
        "norm": error_of(lambda: run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)),
        "named": error_of(lambda: run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm=1.0)),
        "value": error_of(lambda: run.accelerator.clip_grad_value_(run.model.parameters(), 1.0)),
        "bare optimizer": error_of(lambda: dgc.accelerate.attach(run.accelerator, run.model, bare)),
        "bare model": error_of(lambda: dgc.accelerate.attach(run.accelerator, run.net, run.optimizer)),
        "another's": error_of(lambda: run.accelerator.clip_grad_norm_(other.parameters(), 1.0)),
        "measured": norm > 0,
    }
    run.optimizer.step()
    run.optimizer.zero_grad()
    errors["dense"] = error_of(lambda: run.accelerator.load_state(folder))
    return errors


def nodes_of_one_rank():
    run = Run(attach=False)
    os.environ.update(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    run.attach(mesh="auto")
    return run


class Gan:
    """A generator and a discriminator in the usual loop, prepared by Accelerate or wrapped by hand."""

    def __init__(self, accelerator=None):
        torch.manual_seed(0)
        self.nets = [nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, width)) for width in (20, 1)]
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in self.nets]
        self.accelerator = accelerator
        if accelerator is None:
            self.models = [DistributedDataParallel(net) for net in self.nets]
            self.optimizers = optimizers
        else:
            *self.models, first, second = accelerator.prepare(*self.nets, *optimizers)
            self.optimizers = [first, second]
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            if accelerator is None:
                dgc.attach(model, optimizer, CONFIG, in_step=True)
            else:
                dgc.accelerate.attach(accelerator, model, optimizer, CONFIG, in_step=True)

    def train(self, rank, steps):
        (generator, discriminator), (generate, discriminate) = self.models, self.optimizers
        backward = torch.Tensor.backward if self.accelerator is None else self.accelerator.backward
        for step in steps:
            real, _ = batch(step, rank)
            drawn = generator(batch(step + 100, rank)[0])
            discriminate.zero_grad()
            backward(nn.functional.softplus(-discriminator(real)).mean())
            backward(nn.functional.softplus(discriminator(drawn.detach())).mean())
            discriminate.step()
            generate.zero_grad()
            backward(nn.functional.softplus(-discriminator(drawn)).mean())
            generate.step()
        return self

    def results(self):
        return [outcome(net, one.dgc) for net, one in zip(self.nets, self.optimizers, strict=True)]


def gans(rank, folder):
    from accelerate import Accelerator

    import dgc.accelerate  # noqa: F401

    accelerators = [Accelerator(cpu=True) for _ in range(3)]
    before = Gan(accelerators[1]).train(rank, range(3))
    accelerators[1].save_state(f"{folder}/gan")
    after = Gan(accelerators[2])
    accelerators[2].load_state(f"{folder}/gan")
    assert before.results()[1]["step"] == 3
    return {
        "by hand": Gan().train(rank, range(6)).results(),
        "straight": Gan(accelerators[0]).train(rank, range(6)).results(),
        "resumed": after.train(rank, range(3, 6)).results(),
    }


def everything(rank, world_size, folder):
    pretend(rank, world_size)
    straight = Run().train(rank, range(6))
    straight.attach()  # again, and nothing changes
    before = Run().train(rank, range(3))
    before.accelerator.save_state(f"{folder}/a")
    after = Run()
    after.accelerator.load_state(f"{folder}/a")
    after.train(rank, range(3, 6))
    # A dense run that goes on with DGC.
    dense = Run(attach=False).train(rank, range(2))
    dense.accelerator.save_state(f"{folder}/dense")
    gone_on = Run(attach=False)
    gone_on.accelerator.load_state(f"{folder}/dense")
    gone_on.attach()
    gone_on.train(rank, range(2, 5))
    return {
        "by hand": by_hand(rank, 6),
        "straight": straight.result(),
        "resumed": after.result(),
        "from dense": gone_on.result(),
        "scaled": Run(scaler=torch.amp.GradScaler("cpu", init_scale=4.0)).train(rank, range(6)).result(),
        "nodes": nodes_of_one_rank().train(rank, range(6)).result(),
        "gan": gans(rank, folder),
        "errors": misuse(after, rank, f"{folder}/dense"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, everything, str(tmp_path_factory.mktemp("accelerate")))


def test_accumulation_under_accelerate_has_the_bits_of_the_three_lines(ranks):
    assert_equal([r["straight"] for r in ranks], [r["by hand"] for r in ranks])


@pytest.mark.parametrize("kind", ["scaled", "nodes"])
def test_with_a_grad_scaler_and_with_nodes_of_one_rank_too(ranks, kind):
    assert_equal([r[kind] for r in ranks], [r["by hand"] for r in ranks])


def test_save_state_and_load_state_resume_to_the_bit(ranks):
    assert_equal([r["straight"] for r in ranks], [r["resumed"] for r in ranks])
    assert any(r["straight"]["residual"]["0.weight"].any() for r in ranks)
    first, second = (r["straight"]["residual"]["0.weight"] for r in ranks)
    assert not torch.equal(first, second)  # rank 0's alone would not do


@pytest.mark.parametrize("kind", ["straight", "resumed"])
def test_two_models_in_the_loop_of_a_gan_have_the_bits_of_one_by_hand(ranks, kind):
    for which in range(2):
        assert_equal([r["gan"][kind][which] for r in ranks], [r["gan"]["by hand"][which] for r in ranks])
    assert all(r["gan"]["by hand"][1]["step"] == 6 for r in ranks)


def test_a_dense_run_goes_on(ranks):
    assert_replicas_equal([r["from dense"] for r in ranks])


def nodes(rank, world_size, folder):
    pretend(rank, world_size)
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))

    def made():
        run = Run(attach=False)
        run.attach(mesh="auto")
        return run

    straight = made().train(rank, range(6)).result()
    before = made().train(rank, range(3))
    before.accelerator.save_state(f"{folder}/nodes")
    after = made()
    after.accelerator.load_state(f"{folder}/nodes")
    return straight, after.train(rank, range(3, 6)).result()


def test_two_nodes_of_two_ranks_resume_to_the_bit(tmp_path):
    results = run_ranks(4, nodes, str(tmp_path))
    assert_equal([straight for straight, _ in results], [resumed for _, resumed in results])
    assert_replicas_equal([straight for straight, _ in results])
    assert {len(straight["residual"]["0.weight"]) for straight, _ in results} == {50}  # of a hundred rows


def test_each_wrong_use_says_what_to_do(ranks):
    for errors in (r["errors"] for r in ranks):
        for name in ("norm", "named", "value"):
            assert "expected no clipping of what DGC has exchanged" in errors[name]
            assert "DGCConfig(clip_norm=...)" in errors[name]
        assert "got DistributedDataParallel and SGD under MULTI_CPU" in errors["bare optimizer"]
        assert "got Sequential and AcceleratedOptimizer under MULTI_CPU" in errors["bare model"]
        assert "Load a dense run before dgc.accelerate.attach()" in errors["dense"]
        assert errors["another's"] == ""
        assert errors["measured"]
