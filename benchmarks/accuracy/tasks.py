"""What the programs of this folder train: small tasks on the samples of data.py.

Small enough that several thousand steps of four workers take half a minute to two on one core; at 0.1 % an entry may
wait for a thousand steps, so a shorter run would say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, LRScheduler
from torch.optim.optimizer import Optimizer

from benchmarks.architectures import GPT, LSTM, SequenceClassifier, ViT, mlp

from .data import LENGTH, VOCABULARY, Data, bible, digits, letters, mnist, vowels


@dataclass(frozen=True)
class Task:
    """A network, its data and the recipe of its dense training, which DGC takes over unchanged."""

    about: str
    metric: Literal["accuracy", "perplexity"]
    load: Callable[[], Data]
    network: Callable[[], nn.Module]
    lr: float
    """The highest; falls to 0 along a cosine."""
    lr_warmup: float = 0.0
    """Share of the run in which the learning rate rises linearly."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None
    batch_size: int = 16
    """Of each worker."""
    steps: int = 3000
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW, which has no momentum besides."""
    eps: float = 1e-8

    @property
    def recipe(self) -> str:
        """What the training of this task depends on besides its length. Finished runs are found again by it."""
        clip = f", gradients clipped at {self.clip_norm:g}" if self.clip_norm else ""
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        rise = f", rising over the first {self.lr_warmup:.0%}".replace("%", " %") if self.lr_warmup else ""
        rest = f"{decay}{clip}, batch {self.batch_size} a worker"
        if self.optimizer == "AdamW":
            first, second = self.betas
            return f"AdamW, lr {self.lr:g} (cosine{rise}), betas {first:g} and {second:g}{rest}"
        return f"lr {self.lr:g} (cosine{rise}), momentum {self.momentum:g}{rest}"


def schedule_of(task: Task, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Returns the learning rate's schedule over a run."""
    fall = CosineAnnealingLR(optimizer, steps)
    rise = round(task.lr_warmup * steps)
    return ChainedScheduler([fall, LinearLR(optimizer, 1 / rise, total_iters=rise)]) if rise else fall


def loss_of(scores: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross entropy of scores (..., classes), with labels that give this share to all classes."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten(), label_smoothing=smoothing)


@torch.no_grad()
def measure(task: Task, model: nn.Module, samples: int | None = None) -> float:
    """Returns accuracy in per cent, or perplexity, on the test samples, or on the first of them."""
    data = task.load()
    model.eval()
    right, loss, count = 0, 0.0, 0
    test = data.test_inputs[:samples], data.test_targets[:samples]
    for inputs, targets in zip(*(part.split(250) for part in test), strict=True):
        scores = model(inputs)
        right += int((scores.argmax(-1) == targets).sum())
        loss += float(loss_of(scores, targets)) * targets.numel()
        count += targets.numel()
    model.train()
    return 100 * right / count if task.metric == "accuracy" else math.exp(min(loss / count, 50.0))


def _adamw(about: str, network: Callable[[], nn.Module], **changes: Any) -> Task:
    """Returns a task of a transformer, on the King James Bible by default; `changes` are fields of Task."""
    recipe = {
        "metric": "perplexity",
        "load": bible,
        "lr": 8e-3,
        "lr_warmup": 0.1,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "batch_size": 4,
        "steps": 5000,
    }
    return Task(about, network=network, optimizer="AdamW", **{**recipe, **changes})


def _small_cnn(side: int, widths: tuple[int, int], hidden: int) -> nn.Module:
    """Returns two convolutions with BatchNorm, each in front of a halving, and two linear layers."""
    first, second = widths
    left = side // 4
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * left * left, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


TASKS = {
    "mnist": Task(
        "CNN with BatchNorm on 4,000 MNIST digits of 14 x 14",
        "accuracy",
        mnist,
        lambda: _small_cnn(14, (16, 32), 128),
        lr=0.05,
        weight_decay=5e-4,
    ),
    "digits": Task(
        "CNN with BatchNorm on 1,297 digits of 8 x 8",
        "accuracy",
        digits,
        lambda: _small_cnn(8, (32, 64), 128),
        lr=0.05,
        weight_decay=5e-4,
        steps=2000,
    ),
    "letters": Task(
        "MLP on 15,000 rows of LetterRecognition",
        "accuracy",
        letters,
        lambda: mlp(16, 256, 256, 26),
        lr=0.2,
        batch_size=32,
    ),
    "vowels": Task(
        "LSTM of two layers of width 64, which tells nine speakers by 270 recordings of vowels",
        "accuracy",
        vowels,
        lambda: SequenceClassifier(12, 64, 2, 9),
        lr=0.1,
        clip_norm=0.25,
        batch_size=8,
        steps=2000,
    ),
    "lstm": Task(
        "LSTM on the King James Bible, SGD without momentum",
        "perplexity",
        bible,
        lambda: LSTM(VOCABULARY, 96),
        lr=20.0,
        momentum=0.0,
        clip_norm=0.25,
        batch_size=4,
        steps=5000,
    ),
    "gpt": Task(
        "GPT of one block on the King James Bible",
        "perplexity",
        bible,
        lambda: GPT(VOCABULARY, 96, depth=1, heads=4, context=LENGTH),
        lr=0.1,
        lr_warmup=0.1,
        clip_norm=1.0,
        batch_size=4,
        steps=5000,
    ),
    "gpt-adamw": _adamw(
        "GPT of one block of width 96 on the King James Bible",
        lambda: GPT(VOCABULARY, 96, depth=1, heads=4, context=LENGTH),
    ),
    "gpt2-adamw": _adamw(
        "GPT of two blocks of width 128 on the King James Bible",
        lambda: GPT(VOCABULARY, 128, depth=2, heads=4, context=LENGTH),
        lr=2e-3,
    ),
    "gpt-1.5M": _adamw(
        "GPT of 1.5 million parameters: 3 blocks of width 192",
        lambda: GPT(VOCABULARY, 192, depth=3, heads=8, context=LENGTH),
        lr=2e-3,
        steps=250,
        batch_size=2,
    ),
    "gpt-4.5M": _adamw(
        "GPT of 4.5 million parameters: 4 blocks of width 296",
        lambda: GPT(VOCABULARY, 296, depth=4, heads=8, context=LENGTH),
        lr=1.3e-3,
        steps=738,
        batch_size=2,
    ),
    "gpt-12M": _adamw(
        "GPT of 12 million parameters: 5 blocks of width 440",
        lambda: GPT(VOCABULARY, 440, depth=5, heads=8, context=LENGTH),
        lr=9e-4,
        steps=1973,
        batch_size=2,
    ),
    "vit-adamw": _adamw(
        "ViT of two blocks of width 64 on 4,000 MNIST digits of 14 x 14, in patches of 2 x 2",
        lambda: ViT(14, 2, 64, depth=2, heads=4, classes=10),
        metric="accuracy",
        load=mnist,
        lr=2e-3,
        batch_size=16,
        steps=3000,
    ),
}
"""By name."""
