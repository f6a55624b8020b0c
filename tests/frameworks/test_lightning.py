"""dgc.lightning on the real Trainer, by both names of the package: the bits of the three lines, checkpoints, misuse."""

import os
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dgc
from support.messages import Messages, error_of
from support.ranks import run_ranks
from support.torchrun import pretend
from support.training import assert_equal, assert_replicas_equal, outcome

if find_spec("lightning") is None:  # each rank imports it, and not each process that collects tests
    reason = "NOT TESTED: dgc.lightning, since Lightning is not installed: '.[lightning]'"
    pytest.skip(reason, allow_module_level=True)

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,), dense_below=100)
EPOCHS = 4
"""Of three steps of two batches each."""
SETTINGS = {"lr": 0.05, "momentum": 0.9}


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    made = [(torch.randn(8, 20, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(6)]
    return DataLoader(made, batch_size=None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 4))


def by_hand(rank):
    """The same run in a loop of its own."""
    net = network()
    model = DistributedDataParallel(net)
    optimizer = dgc.SGD(model.parameters(), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    named = [(f"net.{name}", p) for name, p in net.named_parameters()]
    state = dgc.DGCState(named, optimizer, CONFIG)
    state.register(model)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(batches(rank)):
            model.require_backward_grad_sync = i % 2 == 1
            (nn.functional.cross_entropy(model(x), y) / 2).backward()
            if i % 2 == 1:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return outcome(net, state)


def module_of(name, optimizers=1, manual=False):
    class Module(import_module(name).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.automatic_optimization = optimizers == 1 and not manual

        def training_step(self, batch, number):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
            return None

        def configure_optimizers(self):
            made = [torch.optim.SGD(self.net.parameters(), **SETTINGS) for _ in range(optimizers)]
            if optimizers > 1:
                return made
            scheduler = torch.optim.lr_scheduler.StepLR(made[0], 2, 0.5)
            return {"optimizer": made[0], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def fit(
    rank,
    name,
    epochs,
    resume=None,
    save=None,
    folder=None,
    attach=True,
    optimizers=1,
    manual=False,
    mesh=None,
    **settings,
):
    from dgc.lightning import DGCCallback

    pl = import_module(name)
    callback = DGCCallback(CONFIG, mesh=mesh)
    callbacks = [callback] if attach else []
    if folder:
        callbacks.append(import_module(f"{name}.callbacks").ModelCheckpoint(folder, "{epoch}", save_top_k=-1))
    module = module_of(name, optimizers, manual)
    settings = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, **settings}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        use_distributed_sampler=False,
        enable_checkpointing=folder is not None,
        callbacks=callbacks,
        **quiet,
        **settings,
    )
    trainer.fit(module, batches(rank), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return outcome(module.net, callback.state) if attach else None


def runs(rank, name, folder):
    """A run; two that go on in its middle, from its own checkpoint and from one saved after fit(); and a dense one."""
    folder = f"{folder}/{name}"
    straight = fit(rank, name, EPOCHS, folder=folder)
    fit(rank, name, 2, save=f"{folder}/after.ckpt")
    fit(rank, name, 2, save=f"{folder}/dense.ckpt", attach=False)
    return {
        "straight": straight,
        "resumed": fit(rank, name, EPOCHS, resume=f"{folder}/epoch=1.ckpt"),
        "after": fit(rank, name, EPOCHS, resume=f"{folder}/after.ckpt"),
        "from dense": fit(rank, name, EPOCHS, resume=f"{folder}/dense.ckpt"),
    }


def loops(rank, name):
    """The same run without accumulation, in other ways that Lightning has."""
    from lightning.pytorch.strategies import DDPStrategy

    once = {"accumulate_grad_batches": 1}
    return {
        "automatic": fit(rank, name, 2, **once),
        "manual": fit(rank, name, 2, manual=True, **once),
        "static graph": fit(rank, name, 2, strategy=DDPStrategy(static_graph=True), **once),
    }


def everything(rank, world_size, folder):
    pretend(rank, world_size)
    messages = Messages()
    name = "lightning.pytorch"
    found = runs(rank, name, folder)
    warned = [line for line in messages.lines if "the optimizer has taken" in line or "left them" in line]
    return {
        "by hand": by_hand(rank),
        **found,
        "warned": warned,
        **loops(rank, name),
        "clip": error_of(lambda: fit(rank, name, 1, gradient_clip_val=0.5)),
        "several": error_of(lambda: fit(rank, name, 1, optimizers=2, accumulate_grad_batches=1)),
        "older name": runs(rank, "pytorch_lightning", folder) if find_spec("pytorch_lightning") else None,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, everything, str(tmp_path_factory.mktemp("lightning")))


def test_accumulation_under_lightning_has_the_bits_of_the_three_lines(ranks):
    assert_equal([r["straight"] for r in ranks], [r["by hand"] for r in ranks])


def test_manual_optimization_and_a_static_graph_change_no_bit(ranks):
    assert all(r["automatic"]["step"] == 12 for r in ranks)
    for kind in ("manual", "static graph"):
        assert_equal([r["automatic"] for r in ranks], [r[kind] for r in ranks])


def test_a_checkpoint_resumes_to_the_bit(ranks):
    for kind in ("resumed", "after"):
        assert_equal([r["straight"] for r in ranks], [r[kind] for r in ranks])
    first, second = (r["straight"]["residual"]["net.0.weight"] for r in ranks)
    assert first.any()
    assert not torch.equal(first, second)  # rank 0's alone would not do
    assert all(r["warned"] == [] for r in ranks)  # of a changed gradient, or a missing residual


def test_a_dense_run_goes_on(ranks):
    assert_replicas_equal([r["from dense"] for r in ranks])
    assert all(r["from dense"]["step"] == 6 for r in ranks)


def test_each_wrong_use_says_what_to_do(ranks):
    for r in ranks:
        assert "DGCConfig(clip_norm=...)" in r["clip"]
        assert "expected one optimizer, got 2" in r["several"]
    from dgc.lightning import DGCCallback

    other = SimpleNamespace(world_size=2, model=network(), strategy=object())
    with pytest.raises(TypeError, match="strategy: expected DDPStrategy, got object"):
        DGCCallback().on_fit_start(other, None)


def nodes(rank, world_size, folder):
    pretend(rank, world_size)
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2", GROUP_RANK=str(rank // 2))
    settings = {"name": "lightning.pytorch", "mesh": "auto", "num_nodes": 2, "accumulate_grad_batches": 1}
    straight = fit(rank, epochs=2, **settings)
    fit(rank, epochs=1, save=f"{folder}/nodes.ckpt", **settings)
    resumed = fit(rank, epochs=2, resume=f"{folder}/nodes.ckpt", **settings)
    flat = fit(rank, epochs=2, resume=f"{folder}/nodes.ckpt", **{**settings, "mesh": None})
    return {"straight": straight, "resumed": resumed, "flat": flat}


def test_nodes_of_the_trainers_devices_are_the_workers_and_their_checkpoint_goes_on(tmp_path):
    results = run_ranks(4, nodes, str(tmp_path))
    rows = {len(r["straight"]["residual"]["net.0.weight"]) for r in results}
    assert rows == {50}  # of a hundred
    assert_equal([r["straight"] for r in results], [r["resumed"] for r in results])
    assert_replicas_equal([r["straight"] for r in results])
    assert_replicas_equal([r["flat"] for r in results])
    assert [r["flat"]["step"] for r in results] == [12] * 4


def test_the_callback_serves_the_trainer_of_the_older_name_too(ranks):
    if ranks[0]["older name"] is None:
        pytest.skip("NOT TESTED: dgc.lightning with pytorch_lightning, which is not installed")
    for kind in ("straight", "resumed", "after", "from dense"):
        assert_equal([r[kind] for r in ranks], [r["older name"][kind] for r in ranks])
