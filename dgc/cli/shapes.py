"""Names and shapes of the parameters of published networks, without their weights or their code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Shapes = dict[str, tuple[int, ...]]
"""Shape by name, in the order of named_parameters()."""


def _layer(name: str, *shape: int) -> Shapes:
    """Returns a weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet50() -> Shapes:
    """Returns ResNet-50 for ImageNet (He et al. 2015; torchvision.models.resnet50): 25,557,032."""

    def convolution(name: str, outputs: int, inputs: int, size: int) -> Shapes:
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        return {f"{name}.weight": (outputs, inputs, size, size), **_layer(norm, outputs)}

    shapes = convolution("conv1", 64, 3, 7)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            shapes |= convolution(f"{name}.conv1", width, inputs, 1)
            shapes |= convolution(f"{name}.conv2", width, width, 3)
            shapes |= convolution(f"{name}.conv3", 4 * width, width, 1)
            if block == 0:
                shapes |= convolution(f"{name}.downsample.0", 4 * width, inputs, 1)
            inputs = 4 * width
    return shapes | _layer("fc", 1000, inputs)


def alexnet() -> Shapes:
    """Returns AlexNet with its two groups, as published (Krizhevsky et al. 2012; Caffe's bvlc_alexnet): 60,965,224."""
    return {
        **_layer("conv1", 96, 3, 11, 11),
        **_layer("conv2", 256, 48, 5, 5),
        **_layer("conv3", 384, 256, 3, 3),
        **_layer("conv4", 384, 192, 3, 3),
        **_layer("conv5", 256, 192, 3, 3),
        **_layer("fc6", 4096, 256 * 6 * 6),
        **_layer("fc7", 4096, 4096),
        **_layer("fc8", 1000, 4096),
    }


def ptb_lstm() -> Shapes:
    """Returns the language model of 2 x 1500 LSTM cells, 10,000 words, embedding and output tied: 51,034,000.

    Press & Wolf 2016, the paper's reference for it; with nn.LSTM's two biases a gate.
    """
    shapes: Shapes = {"embedding.weight": (10_000, 1500)}
    for layer in range(2):
        shapes |= {f"lstm.weight_{kind}_l{layer}": (6000, 1500) for kind in ("ih", "hh")}
        shapes |= {f"lstm.bias_{kind}_l{layer}": (6000,) for kind in ("ih", "hh")}
    return shapes | {"decoder.bias": (10_000,)}


def vgg16() -> Shapes:
    """Returns VGG-16 for ImageNet (Simonyan & Zisserman 2014; torchvision.models.vgg16): 138,357,544."""
    shapes: Shapes = {}
    inputs, place = 3, 0
    for outputs, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            shapes |= _layer(f"features.{place}", outputs, inputs, 3, 3)
            inputs, place = outputs, place + 2  # a ReLU in between
        place += 1  # a pooling layer
    return {
        **shapes,
        **_layer("classifier.0", 4096, 512 * 7 * 7),
        **_layer("classifier.3", 4096, 4096),
        **_layer("classifier.6", 1000, 4096),
    }


def bert_large() -> Shapes:
    """Returns BERT-large, uncased, as it is pre-trained: 336,226,108.

    Devlin et al. 2018, in the form of Hugging Face's BertForPreTraining: encoder and pooler (335,141,888), the head for
    masked words, whose output matrix is the word embedding, and the head for the next sentence.
    """
    width = 1024
    shapes: Shapes = {
        "embeddings.word.weight": (30_522, width),
        "embeddings.position.weight": (512, width),
        "embeddings.token_type.weight": (2, width),
        **_layer("embeddings.norm", width),
    }
    for i in range(24):
        for name in ("query", "key", "value", "output"):
            shapes |= _layer(f"layer.{i}.attention.{name}", width, width)
        shapes |= _layer(f"layer.{i}.attention.norm", width)
        shapes |= _layer(f"layer.{i}.up", 4 * width, width)
        shapes |= _layer(f"layer.{i}.down", width, 4 * width)
        shapes |= _layer(f"layer.{i}.norm", width)
    return {
        **shapes,
        **_layer("pooler", width, width),
        "words.bias": (30_522,),
        **_layer("words.transform", width, width),
        **_layer("words.norm", width),
        **_layer("next_sentence", 2, width),
    }


def gpt2_small() -> Shapes:
    """Returns GPT-2 small (Radford et al. 2019; the names and matrices of Hugging Face's): 124,439,808."""

    def transposed(name: str, inputs: int, outputs: int) -> Shapes:
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    width = 768
    shapes: Shapes = {"wte.weight": (50_257, width), "wpe.weight": (1024, width)}
    for i in range(12):
        shapes |= _layer(f"h.{i}.ln_1", width)
        shapes |= transposed(f"h.{i}.attn.c_attn", width, 3 * width)
        shapes |= transposed(f"h.{i}.attn.c_proj", width, width)
        shapes |= _layer(f"h.{i}.ln_2", width)
        shapes |= transposed(f"h.{i}.mlp.c_fc", width, 4 * width)
        shapes |= transposed(f"h.{i}.mlp.c_proj", 4 * width, width)
    return shapes | _layer("ln_f", width)


def llama3_8b() -> Shapes:
    """Returns Llama-3-8B (Grattafiori et al. 2024; 8 key-value heads of 128, output matrix not tied): 8,030,261,248."""
    words, width, inner, keys = 128_256, 4096, 14_336, 1024
    shapes: Shapes = {"embedding": (words, width)}
    for i in range(32):
        shapes |= {
            f"layers.{i}.query": (width, width),
            f"layers.{i}.key": (keys, width),
            f"layers.{i}.value": (keys, width),
            f"layers.{i}.out": (width, width),
            f"layers.{i}.gate": (inner, width),
            f"layers.{i}.up": (inner, width),
            f"layers.{i}.down": (width, inner),
            f"layers.{i}.attention_norm": (width,),
            f"layers.{i}.mlp_norm": (width,),
        }
    return shapes | {"norm": (width,), "output": (words, width)}


NETWORKS: Mapping[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50,
    "AlexNet": alexnet,
    "PTB LSTM": ptb_lstm,
    "VGG-16": vgg16,
    "BERT-large": bert_large,
    "GPT-2 small": gpt2_small,
    "Llama-3-8B": llama3_8b,
}


def matrices(shapes: Shapes) -> list[tuple[int, int]]:
    """Returns rows and columns of all that has more than one dimension: a row for each first index."""
    return [(shape[0], math.prod(shape[1:])) for shape in shapes.values() if len(shape) > 1]
