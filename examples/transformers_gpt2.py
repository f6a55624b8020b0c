"""Trains a small GPT-2 on the bytes of Python's own library by the Trainer of transformers.

    torchrun --standalone --nproc-per-node 2 examples/transformers_gpt2.py
    torchrun --standalone --nproc-per-node 2 examples/transformers_gpt2.py --steps 200 --resume

Nothing is downloaded. The second line goes on from the last checkpoint of the first, with the residual of all ranks.
"""

import argparse
import logging
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import dgc
import dgc.transformers

CONTEXT = 64


def samples() -> list[dict[str, torch.Tensor]]:
    """Returns stretches of text, each byte a word."""
    text = b"".join(path.read_bytes() for path in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    words = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"input_ids": line, "labels": line} for line in words.split(CONTEXT)[:-1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/transformers", help="of the checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in it")
    for option, default in (("--steps", 100), ("--seed", 0)):
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dense", action="store_true", help="without DGC")
    args = parser.parse_args()
    logging.basicConfig()
    logging.getLogger("dgc").setLevel(logging.INFO)

    torch.manual_seed(args.seed)
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    settings = TrainingArguments(
        args.folder,
        max_steps=args.steps,
        learning_rate=1e-3,
        seed=args.seed,
        save_steps=50,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # the Trainer's default looks for some at every step
    )
    trainer = Trainer(model, settings, train_dataset=samples()[256:], eval_dataset=samples()[:256])
    if not args.dense:
        config = dgc.DGCConfig(density=0.01, warmup_steps=50, warmup_densities=(0.0625, 0.0156))
        dgc.transformers.attach(trainer, config)
    trainer.train(resume_from_checkpoint=args.resume)
    sent = "" if args.dense else f", {trainer.optimizer.dgc.stats.bytes_sent} bytes a step"
    trainer.accelerator.print(f"test loss {trainer.evaluate()['eval_loss']:.4f}{sent}")
