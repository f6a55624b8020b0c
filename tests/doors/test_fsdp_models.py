"""FSDP2 with DGC on what users have: transformers, accumulation, mixed precision, tied and unused parameters."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import dgc
from support.fsdp_run import IslandRun
from support.models import integers
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.05, dense_below=500)
WORDS, WIDTH, LENGTH = 50, 32, 8


class Block(nn.Module):
    """A block of a transformer, recomputed in the backward pass if asked for."""

    def __init__(self, recompute=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.recompute = recompute

    def inner(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)


class Model(nn.Module):
    """Predicts words; the embedding may be the output layer too."""

    def __init__(self, tied=False, unused=False, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(recompute) for _ in range(2)])
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.out.weight = self.embedding.weight
        if unused:
            self.unused = nn.Linear(40, 40)

    def forward(self, words):
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.out(x).float()


class Training:
    """One rank's training of a Model."""

    def __init__(self, net, shard=None, optimizer=dgc.AdamW, config=CONFIG, compiled=False, **settings):
        def sharded(module, mesh):
            fully_shard(module, mesh=mesh, **(shard or {}))

        super().__init__()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for block in net.blocks:
            if compiled:
                block.compile(backend="aot_eager")
            sharded(block, mesh["shard"])
        sharded(net, mesh["shard"])
        if next(net.parameters()).is_meta:
            net.to_empty(device="cpu")
            torch.manual_seed(0)
            for p in net.parameters():
                nn.init.normal_(p, std=0.1)
        self.net = net
        trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = optimizer(trained, **{"lr": 0.01, **settings})
        group = mesh["replicate"].get_group()
        self.state = dgc.DGCState(net.named_parameters(), self.optimizer, config, process_group=group)
        self.state.register(net)
        self.generator = torch.Generator().manual_seed(torch.distributed.get_rank())

    def loss(self):
        words = torch.randint(0, WORDS, (4, LENGTH), generator=self.generator)
        return nn.functional.cross_entropy(self.net(words).flatten(0, 1), ((3 * words + 1) % WORDS).flatten())

    def step(self, count=1):
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def result(self):
        return {
            "parameters": {n: p.full_tensor().detach().clone() for n, p in self.net.named_parameters()},
            "stats": self.state.stats,
            "sent": sorted(set(self.state.parameters.by_name) - self.state.stats.dense.keys()),
        }


def learn(rank, world_size, model, options, steps=60):
    warnings.simplefilter("ignore", FutureWarning)  # torch's own
    training = Training(Model(**model), **options)
    losses = training.step(steps)
    return {**training.result(), "losses": losses}


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
BF16_REDUCED = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"tied": True, "recompute": True}, {"shard": {"reshard_after_forward": False}}),
        ({"unused": True}, {"shard": {"mp_policy": BF16}}),
        ({}, {"shard": {"mp_policy": BF16_REDUCED}, "optimizer": dgc.SGD, "lr": 0.2, "momentum": 0.9}),
        ({}, {"compiled": True}),
    ],
    ids=["plain", "tied, recomputed", "unused, bf16", "bf16 reduced, SGD", "compiled"],
)
def test_a_transformer_learns_and_its_nodes_stay_equal(model, options):
    results = run_ranks(4, learn, model, options, timeout=120)
    assert_replicas_equal(results)
    for result in results:
        assert sum(result["losses"][-5:]) / 5 < 0.6 * result["losses"][0]
        assert "blocks.0.up.weight" in result["sent"]
        assert result["stats"].skipped == 0


def learn_from_meta(rank, world_size):
    with torch.device("meta"):
        net = Model()
    frozen = net.blocks[0].down.weight
    frozen.requires_grad_(False)
    training = Training(net)
    before = net.blocks[0].down.weight.full_tensor().clone()
    training.step(3)
    return {**training.result(), "frozen": torch.equal(before, net.blocks[0].down.weight.full_tensor())}


def test_a_model_made_on_the_meta_device_with_a_frozen_parameter():
    results = run_ranks(4, learn_from_meta)
    assert_replicas_equal(results)
    assert all(r["frozen"] and "blocks.0.down.weight" not in r["sent"] for r in results)


def accumulate(rank, world_size, how):
    run = IslandRun(2, dgc.DGCConfig(density=0.008), lr=0.25, momentum=0.0)
    for step in range(4):
        run.optimizer.zero_grad()
        for part in range(3):
            gradients = integers(SHAPES, seed_of(step, 10 * rank + part))
            last = part == 2
            if how == "FSDP2 adds up":
                run.net.set_requires_gradient_sync(last)
                run.backward(gradients)
            elif last:
                run.backward(gradients)
            else:
                with run.state.no_sync():
                    run.backward(gradients)
        run.optimizer.step()
    return run.result()


def at_once(rank, world_size):
    run = IslandRun(2, dgc.DGCConfig(density=0.008), lr=0.25, momentum=0.0)
    for step in range(4):
        parts = [integers(SHAPES, seed_of(step, 10 * rank + part)) for part in range(3)]
        run.train({name: sum(part[name] for part in parts) for name in SHAPES})
    return run.result()


def test_both_ways_to_accumulate_send_the_sum():
    expected = run_ranks(4, at_once)
    for how in ("FSDP2 adds up", "no_sync"):
        for one, other in zip(expected, run_ranks(4, accumulate, how), strict=True):
            for kind in ("parameters", "residual"):
                assert all(torch.equal(tensor, other[kind][name]) for name, tensor in one[kind].items()), how


def save_optimizer(rank, world_size, optimizer):
    """Saves the optimizer's state by torch's functions for sharded models, and loads it into another."""
    straight = Training(Model(), optimizer=optimizer, weight_decay=0.1)
    straight.step(3)
    saved = get_optimizer_state_dict(straight.net, straight.optimizer)
    other = Training(Model(), optimizer=optimizer, weight_decay=0.1)
    set_optimizer_state_dict(other.net, other.optimizer, saved)
    pairs = zip(straight.net.parameters(), other.net.parameters(), strict=True)
    return [(straight.optimizer.state[p]["step"].item(), other.optimizer.state[q]["step"].item()) for p, q in pairs]


@pytest.mark.parametrize("optimizer", [dgc.SGD, dgc.AdamW])
def test_the_optimizers_state_goes_through_torchs_sharded_state_dict(optimizer):
    for counts in run_ranks(4, save_optimizer, optimizer):
        assert all(pair == (3.0, 3.0) for pair in counts)


def hsdp(rank, world_size, ours):
    """Trains with everything sent, and with FSDP2's own average over both dimensions of the mesh."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = Model()
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh["shard"] if ours else mesh)
        module.set_force_sum_reduction_for_comms(True)
    if ours:
        optimizer = dgc.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        config = dgc.DGCConfig(density=1.0, dense_below=0)
        dgc.DGCState(net.named_parameters(), optimizer, config, mesh=mesh).register(net)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    generator, losses = torch.Generator().manual_seed(rank), []
    for _ in range(100):
        words = torch.randint(0, WORDS, (4, LENGTH), generator=generator)
        loss = nn.functional.cross_entropy(net(words).flatten(0, 1), ((3 * words + 1) % WORDS).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"parameters": {n: p.full_tensor().detach() for n, p in net.named_parameters()}, "losses": losses}


def test_at_density_1_the_curve_is_that_of_fsdp2s_own_hsdp():
    ours, theirs = run_ranks(4, hsdp, True), run_ranks(4, hsdp, False)
    assert_replicas_equal(ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-3, abs=1e-4)
        assert one["losses"][-1] < 0.1 * one["losses"][0]
        for name, p in one["parameters"].items():
            torch.testing.assert_close(p, other["parameters"][name], rtol=1e-2, atol=1e-3)
