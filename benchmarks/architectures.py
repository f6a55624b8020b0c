"""The networks that the benchmarks train, at any size: an MLP, a ResNet, LSTMs, a small GPT and a ViT."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Returns linear layers between these widths, with ReLU in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, 3, stride), nn.ReLU(), _convolution(outputs, outputs, 3, 1)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Basic blocks with BatchNorm, one for each width, each after the first at half the resolution."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int]) -> None:
        """Makes it for images (batch, channels, height, width)."""
        super().__init__()
        self.stem = nn.Sequential(_convolution(channels, widths[0], 3, 1), nn.ReLU())
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(_Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores (batch, classes)."""
        features: Tensor = self.blocks(self.stem(images))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


class LSTM(nn.Module):
    """A language model: LSTM layers between an embedding and its transpose (as in PTB's, paper section 4.1)."""

    def __init__(self, vocabulary: int, width: int, layers: int = 1) -> None:
        """Makes it with the paper's initial range of the embedding."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, words: Tensor) -> Tensor:
        """Returns scores (batch, time, vocabulary) of the words that follow words (batch, time)."""
        out, _ = self.lstm(self.embedding(words))
        return nn.functional.linear(out, self.embedding.weight, self.bias)


class SequenceClassifier(nn.Module):
    """LSTM layers over a sequence of vectors, and a linear layer on what the last of them says at its end."""

    def __init__(self, inputs: int, width: int, layers: int, classes: int) -> None:
        """Makes it for sequences (batch, time, inputs)."""
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        """Returns scores (batch, classes)."""
        out, _ = self.lstm(sequences)
        scores: Tensor = self.head(out[:, -1])
        return scores


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        y: Tensor = x + self.mlp(self.before_mlp(x))
        return y


class GPT(nn.Module):
    """A language model: transformer blocks, LayerNorm in front of each part, embedding and output tied."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, context: int) -> None:
        """Makes it for at most `context` words."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        """Returns scores (batch, time, vocabulary) of the words that follow words (batch, time)."""
        x = self.embedding(words) + self.position[: words.shape[1]]
        return nn.functional.linear(self.norm(self.blocks(x)), self.embedding.weight)


class ViT(nn.Module):
    """An encoder of images: transformer blocks on patches, each of which sees all others."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        """Makes it for images (batch, 1, side, side)."""
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores (batch, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return scores
