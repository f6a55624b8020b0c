"""The command line of `python -m dgc`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from .models import FORMS
from .ranks import UsageError

EPILOG = """On your machines, which are measured in less than 30 seconds:
  torchrun --nproc-per-node 2 -m dgc plan --model train.py:make_model
  horovodrun -np 2 python -m dgc plan --model ResNet-50 --step-ms 213
  srun --ntasks 2 python -m dgc plan --model 4096x4096,4096 --backward-ms 80
Without them, by arithmetic:
  python -m dgc plan --link 1gbit --ranks 8 --model ResNet-50 --step-ms 213
  python -m dgc plan --link 10gbit --ranks 64 --ranks-per-node 8 --model BERT-large --step-ms 373

A function given as --model returns a torch.nn.Module, or a module and its loss, a function of the module that returns
a scalar: then whole steps are taken, and no time need be given.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    found = argparse.ArgumentParser(prog="python -m dgc", description="Deep Gradient Compression for PyTorch.")
    commands = found.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="which way to exchange gradients is the fastest for a model, and the lines for it",
        description="Says which way to exchange a model's gradients is the fastest, and what to write for it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("--model", metavar="MODEL", help=FORMS)
    plan.add_argument("--step-ms", type=float, metavar="MS", help="a step of one worker, without any exchange")
    plan.add_argument("--backward-ms", type=float, metavar="MS", help="its backward pass (default: 2/3 of the step)")
    plan.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="of the measured steps (sgd)")
    plan.add_argument("--ranks-per-node", type=int, metavar="N", help="default: of one host; with --link 1")
    plan.add_argument("--steps", type=int, metavar="N", help="of the whole run: shows hours")
    plan.add_argument("--price", type=float, metavar="P", help="of a rank for an hour, in any currency; needs --steps")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="draws the step times, as .png, .svg or .pdf")
    plan.add_argument("--json", action="store_true", help="prints JSON in place of tables")
    plan.add_argument("--seconds", type=float, default=15, metavar="S", help="for measuring, about (15)")
    paper = plan.add_argument_group("without machines")
    paper.add_argument("--link", metavar="RATE", help="of a node, each way: 1gbit, 100mbit, ...")
    paper.add_argument("--ranks", type=int, metavar="N", help="number of workers")
    paper.add_argument("--latency-us", type=float, default=14, metavar="US", help="between nodes (14, as NCCL has it)")
    paper.add_argument("--share", type=float, default=0.95, help="of the link's rate that a collective reaches (0.95)")
    paper.add_argument("--inside", default="960gbit", metavar="RATE", help="of a rank in its node (960gbit: NVLink)")
    paper.add_argument(
        "--memory-gbytes", type=float, default=720, metavar="RATE",
        help="GB/s of memory that a device reaches, for casting and compressing (720: a V100; a CPU core: about 10)",
    )  # fmt: skip
    doctor = commands.add_parser(
        "doctor",
        help="versions, kernels, network, and a self-test of two ranks: what a bug report needs",
        description="Looks at versions, kernels and network, and trains two ranks for a moment. Exit status 1 if "
        "something is wrong. Under torchrun, horovodrun or srun it looks at all ranks.",
    )
    doctor.add_argument("--json", action="store_true", help="prints JSON, for a bug report")
    doctor.add_argument("--no-self-test", action="store_true", help="looks, but does not train")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit status: 2 for a mistake of the user's, which is said in one line."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "plan":
            from . import plan

            return plan.run(args)
        from . import doctor

        return doctor.run(args)
    except UsageError as error:
        if not dist.is_initialized() or dist.get_rank() == 0:  # all ranks raise it
            print(f"python -m dgc {args.command}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
