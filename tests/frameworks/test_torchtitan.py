"""A training loop written as torchtitan 0.3 writes it (its trainer.py, distributed/fsdp.py), with dgc.attach.

torchtitan itself needs a GPU. What is here as there: blocks sharded one by one and made from the meta device,
gradients that FSDP2 does not divide, a loss over the tokens of all ranks, a container of optimizers, accumulation, the
norm of all gradients, and DCP's checkpoints. The lines marked DGC are those that change.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import dgc
from support.messages import Messages
from support.ranks import run_ranks
from support.training import assert_replicas_equal

WORDS, WIDTH, LENGTH, STEPS = 40, 32, 8, 6
MICRO_BATCHES = 2
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, words):
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def init_weights(self):
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            whole = 0.2 * torch.randn(p.shape, generator=generator)
            with torch.no_grad():
                p.copy_(dist.tensor.distribute_tensor(whole, p.device_mesh, p.placements) if is_sharded(p) else whole)


def is_sharded(p):
    return isinstance(p, DTensor)


class Container(Optimizer):
    """All optimizers of all parts of a model, as torchtitan's OptimizersContainer."""

    def __init__(self, parts):
        self.optimizers = [torch.optim.AdamW(part.parameters(), **ADAMW) for part in parts]
        Optimizer.__init__(self, [p for part in parts for p in part.parameters()], ADAMW)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def tokens(step, i, rank):
    generator = torch.Generator().manual_seed(1000 * step + 10 * i + rank)
    words = torch.randint(0, WORDS, (2, LENGTH), generator=generator)
    return words, (3 * words + 1) % WORDS


def loss_of(model, words, labels, count):
    return nn.functional.cross_entropy(model(words).flatten(0, 1), labels.flatten(), reduction="sum") / count


class Trainer:
    def __init__(self, config):
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        with torch.device("meta"):
            self.model = Model()
        for block in self.model.blocks:
            fully_shard(block, mesh=self.mesh["dp_shard"])  # DGC: not over both dimensions
        fully_shard(self.model, mesh=self.mesh["dp_shard"])  # DGC
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
        self.model.to_empty(device="cpu")
        self.model.init_weights()
        self.optimizers = Container([self.model])
        dgc.attach(self.model, self.optimizers, config, mesh=self.mesh, average=False)  # DGC: sums, as FSDP2 here
        self.norms = []

    @property
    def optimizer(self):
        return self.optimizers.optimizers[0]

    def train_step(self, step, rank):
        self.optimizers.zero_grad()
        batches = [tokens(step, i, rank) for i in range(MICRO_BATCHES)]
        count = torch.tensor(sum(labels.numel() for _, labels in batches))
        dist.all_reduce(count)
        for i, (words, labels) in enumerate(batches):
            last = i + 1 == len(batches)
            with contextlib.nullcontext() if last else self.optimizers.dgc.no_sync():  # DGC
                loss_of(self.model, words, labels, count).backward()
        parameters = list(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, torch.inf, foreach=True)  # DGC: measures; clip_norm clips
        self.norms.append(norm.full_tensor().item())
        self.optimizers.step()

    def train(self, steps, rank):
        for step in steps:
            self.train_step(step, rank)
        return self

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=f"{folder}/torch")
        dgc.checkpoint.save(self.optimizers.dgc, f"{folder}/dgc")  # DGC

    def load(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=f"{folder}/torch")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        dgc.checkpoint.load(self.optimizers.dgc, f"{folder}/dgc")  # DGC
        return self

    def result(self):
        parameters = {n: p.full_tensor().detach() for n, p in self.model.named_parameters()}
        return {"parameters": parameters, "residual": self.optimizers.dgc.memory.residual.clone()}


def everything(rank, world_size, folder):
    torch.manual_seed(rank)
    messages = Messages()
    all_sent = Trainer(dgc.DGCConfig(density=1.0)).train(range(STEPS), rank)
    sparse = dgc.DGCConfig(density=0.05, dense_below=500, clip_norm=1.0)
    straight = Trainer(sparse).train(range(STEPS), rank)
    half = Trainer(sparse).train(range(STEPS // 2), rank)
    half.save(folder)
    resumed = Trainer(sparse).load(folder).train(range(STEPS // 2, STEPS), rank)
    return {
        "all sent": all_sent.result(),
        "norms": all_sent.norms,
        "straight": straight.result(),
        "resumed": resumed.result(),
        "kind": type(straight.optimizer).__name__ + type(straight.optimizer).__module__,
        "stats": straight.optimizers.dgc.stats,
        "lines": messages.lines,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(4, everything, str(tmp_path_factory.mktemp("torchtitan")))


def test_where_everything_is_sent_it_is_torch_s_adamw_on_the_tokens_of_all_ranks(ranks):
    torch.manual_seed(0)
    model = Model()
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [tokens(step, i, rank) for rank in range(4) for i in range(MICRO_BATCHES)]
        count = sum(labels.numel() for _, labels in batches)
        for words, labels in batches:
            loss_of(model, words, labels, count).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item())
        optimizer.step()
    assert_replicas_equal([r["all sent"] for r in ranks])
    for name, p in model.named_parameters():
        torch.testing.assert_close(ranks[0]["all sent"]["parameters"][name], p.detach(), rtol=1e-3, atol=1e-4)
    assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-4)


def test_the_container_is_looked_into_and_its_adamw_converted(ranks):
    for r in ranks:
        assert r["kind"] == "AdamWdgc.optim.adamw"
        assert r["stats"].compression_ratio > 3


def test_a_run_from_its_checkpoints_has_the_bits_of_one_that_went_on(ranks):
    assert_replicas_equal([r["straight"] for r in ranks])
    for r in ranks:
        for name, p in r["straight"]["parameters"].items():
            assert torch.equal(p, r["resumed"]["parameters"][name]), name
        assert torch.equal(r["straight"]["residual"], r["resumed"]["residual"])
        assert r["straight"]["residual"].any()
