"""Trains a GAN that draws the digit it is asked for: two networks, two optimizers, two residuals in one loop.

    torchrun --standalone --nproc-per-node 2 examples/gan.py --quick
    torchrun --standalone --nproc-per-node 2 examples/gan.py --quick --dense

Each network is in DDP and has a DGCState of its own. The discriminator makes two backward passes before its step, of
real and of drawn digits, and a third in the generator's step, whose gradients its next zero_grad() drops. DDP exchanges
in all three; with in_step=True DGC exchanges their sum, once, in step(). What comes out is the accuracy on real test
digits of a classifier that has seen drawn ones only (the classification accuracy score of Ravuri and Vinyals, 2019): it
falls where digits are wrong or all alike.
"""

import torch
from changing import Traffic, accuracy, batches, finish, options, start
from digits import split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

import dgc

NOISE = 64
BATCH_SIZE = 64  # on each rank


class Generator(nn.Module):
    """Noise and a label to an image of 784 pixels: 700,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(NOISE + 10, 256), nn.LeakyReLU(0.2)),
            *(nn.Linear(256, 512), nn.LeakyReLU(0.2), nn.Linear(512, 784), nn.Tanh()),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images in (-1, 1)."""
        return self.layers(torch.cat([noise, one_hot(labels, 10)], 1))


class Discriminator(nn.Module):
    """An image and its label to one score, of the image being real: 540,000 parameters.

    It has a score for each digit, of which the label takes one: as an input beside 784 pixels it has too little weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
            *(nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 10)),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the scores, one for each image."""
        return self.layers(images).gather(1, labels[:, None]).squeeze(1)


def loss(scores: Tensor, real: float) -> Tensor:
    """Returns the loss of scores that should say with this probability that the images are real."""
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))


def score(generator: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the accuracy on real digits of a classifier that is trained on drawn ones."""
    layers = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    classifier = nn.Sequential(*layers).to(images.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    for _ in range(400):
        wanted = torch.randint(10, (128,), device=images.device)
        with torch.no_grad():
            drawn = generator(torch.randn(128, NOISE, device=images.device), wanted)
        optimizer.zero_grad()
        cross_entropy(classifier(drawn), wanted).backward()
        optimizer.step()
    return accuracy(classifier, images, labels)


def main() -> None:
    """Trains on this rank."""
    args, device = start(options(__doc__), steps=6000, quick=2000)
    train, test_images, test_labels = split(device)
    images, labels = (tensor.to(device) for tensor in train.tensors)
    images = images.flatten(1) * 2 - 1

    generator, discriminator = (DistributedDataParallel(part().to(device)) for part in (Generator, Discriminator))
    adam = torch.optim.Adam if args.dense else dgc.Adam
    generate = adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminate = adam(discriminator.parameters(), lr=3e-4, betas=(0.5, 0.999))  # slower, or it wins
    if not args.dense:
        config = dgc.DGCConfig(args.density, warmup_steps=args.steps // 5)
        for network, optimizer in ((generator, generate), (discriminator, discriminate)):
            optimizer.dgc = dgc.DGCState(network.named_parameters(), optimizer, config)
            optimizer.dgc.register(network, in_step=True)

    traffic = Traffic()
    torch.manual_seed(args.seed + torch.distributed.get_rank())  # noise and dropout differ between ranks
    for chosen in batches(len(images), BATCH_SIZE, args.steps, args.seed):
        real, wanted = images[chosen], labels[chosen]
        drawn = generator(torch.randn(BATCH_SIZE, NOISE, device=device), wanted)
        discriminate.zero_grad()
        loss(discriminator(real, wanted), real=0.9).backward()  # one-sided smoothing
        loss(discriminator(drawn.detach(), wanted), real=0.0).backward()
        discriminate.step()
        traffic.count(discriminate, passes=3)  # the third is in the generator's step

        generate.zero_grad()
        loss(discriminator(drawn, wanted), real=1.0).backward()
        generate.step()
        traffic.count(generate)

    torch.manual_seed(args.seed)
    finish("score", score(generator.module, test_images.flatten(1) * 2 - 1, test_labels), traffic)


if __name__ == "__main__":
    main()
