"""dgc.transformers on the real Trainer, with a small GPT-2: the bits of the three lines, checkpoints, misuse."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.messages import Messages, error_of
from support.ranks import run_ranks
from support.torchrun import pretend
from support.training import assert_equal, assert_replicas_equal, outcome

WHY = "NOT TESTED: dgc.transformers, since transformers and Accelerate are not installed: '.[transformers]'"
if find_spec("transformers") is None or find_spec("accelerate") is None:
    pytest.skip(WHY, allow_module_level=True)

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,), dense_below=100)
STEPS = 6


def network():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0))


def samples():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 64, (128, 16), generator=generator)
    return [{"input_ids": line, "labels": line} for line in words]


def trainer_of(folder, **settings):
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": STEPS, "save_steps": 2, "learning_rate": 0.01, "weight_decay": 0.1, **settings}
    fixed = {"use_cpu": True, "ddp_backend": "gloo", "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, **fixed, **settings)
    return Trainer(network(), args, train_dataset=samples())


def train(folder, resume=None, attach=True, config=CONFIG, mesh=None, **settings):
    import dgc.transformers

    trainer = trainer_of(folder, **settings)
    if attach:
        dgc.transformers.attach(trainer, config, mesh=mesh)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def result(trainer):
    return outcome(trainer.model, trainer.optimizer.dgc)


def by_hand(folder):
    """The same run in a loop of its own: two batches a step, linear decay, two groups of parameters."""
    net = network()
    model = DistributedDataParallel(net)
    trainer = trainer_of(folder)
    decayed = set(trainer.get_decay_parameter_names(net))
    groups = [
        {"params": [p for n, p in net.named_parameters() if (n in decayed) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = dgc.AdamW(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(**{**CONFIG.as_dict(), "clip_norm": 1.0}))
    state.register(model)
    batches = iter(trainer.get_train_dataloader())
    for _ in range(STEPS):
        pair = [next(batches), next(batches)]
        words = sum(batch["labels"].numel() for batch in pair)  # the Trainer divides by those of all batches
        for i, batch in enumerate(pair):
            model.require_backward_grad_sync = i == 1
            loss = model(**batch, num_items_in_batch=torch.tensor(2 * words)).loss * 2
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return outcome(net, state)


def everything(rank, world_size, folder):
    import dgc.transformers

    pretend(rank, world_size)
    messages = Messages()
    accumulating = {"gradient_accumulation_steps": 2}
    folder = Path(folder)
    straight = train(folder / "a", **accumulating)
    straight_result = result(straight)
    lines = list(messages.lines)
    resumed = train(folder / "b", resume=str(folder / "a" / "checkpoint-4"), **accumulating)
    last = folder / "b" / f"checkpoint-{STEPS}" / "dgc"
    without = folder / "without"
    if rank == 0:
        shutil.copytree(folder / "a" / "checkpoint-2", without, ignore=shutil.ignore_patterns("dgc"))
    torch.distributed.barrier()
    train(folder / "dense", attach=False, max_steps=4)
    from_dense = train(folder / "dense", resume=True)
    light = train(folder / "light", save_only_model=True, max_steps=2, config=dgc.DGCConfig(clip_norm=0.5))
    return {
        "by hand": by_hand(folder),
        "straight": straight_result,
        "lines": lines,
        "warned": [line for line in messages.lines if "the optimizer has taken" in line or "left them" in line],
        "max_grad_norm": straight.args.max_grad_norm,
        "resumed": result(resumed),
        "saved": last.is_dir(),
        "from dense": result(from_dense),
        "light": (folder / "light" / "checkpoint-2" / "dgc").exists(),
        "clip_norm": light.optimizer.dgc.config.clip_norm,
        "twice": error_of(lambda: dgc.transformers.attach(light)),
        "settings": error_of(lambda: dgc.transformers.attach(trainer_of(folder / "d", auto_find_batch_size=True))),
        "no residual": error_of(lambda: train(folder / "c", resume=str(without))),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, everything, str(tmp_path_factory.mktemp("transformers")))


def test_the_trainer_has_the_bits_of_the_three_lines(ranks):
    assert_replicas_equal([r["straight"] for r in ranks])
    assert_equal([r["straight"] for r in ranks], [r["by hand"] for r in ranks])


def test_max_grad_norm_is_handed_over_and_said(ranks):
    for r in ranks:
        assert (
            "dgc: clip_norm=1, and max_grad_norm, which was 1, is 0: the Trainer would clip after the exchange"
            in (r["lines"])
        )
        assert r["max_grad_norm"] == 0
        assert r["clip_norm"] == 0.5  # that of the config goes first
        assert r["warned"] == []  # of a changed gradient, or a missing residual


def test_resume_from_checkpoint_has_the_bits_of_a_run_that_went_on(ranks):
    assert_equal([r["straight"] for r in ranks], [r["resumed"] for r in ranks])
    assert all(r["saved"] and r["straight"]["residual"]["transformer.wte.weight"].any() for r in ranks)


def test_a_dense_run_goes_on(ranks):
    assert_replicas_equal([r["from dense"] for r in ranks])
    assert all(r["from dense"]["step"] == STEPS - 4 for r in ranks)


def nodes(rank, world_size, folder):
    pretend(rank, world_size)
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))
    folder = Path(folder)
    straight = train(folder / "a", mesh="auto")
    resumed = train(folder / "b", resume=str(folder / "a" / "checkpoint-4"), mesh="auto")
    return result(straight), result(resumed)


def test_two_nodes_of_two_ranks_resume_to_the_bit(tmp_path):
    results = run_ranks(4, nodes, str(tmp_path))
    assert_equal([straight for straight, _ in results], [resumed for _, resumed in results])
    assert_replicas_equal([straight for straight, _ in results])
    assert {len(straight["residual"]["transformer.wte.weight"]) for straight, _ in results} == {32}  # of 64 rows


def test_each_wrong_use_says_what_to_do(ranks):
    for r in ranks:
        assert "no auto_find_batch_size, got" in r["settings"]
        assert "call attach() once" in r["twice"]
        assert "expected a checkpoint, but there is none" in r["no residual"]
        assert not r["light"]  # save_only_model
