"""Checks of what the command line asks for, each error in one line that says what to do."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch

from .models import FORMS, Model
from .ranks import UsageError, started

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BYTES_A_PARAMETER = 28
"""Weight, gradient, DDP's bucket, two moments or momentum and residual, made-up gradient and its copy."""


def bytes_a_second(rate: str) -> float:
    """Returns bytes a second of a rate such as 1gbit, 100mbit or 2.5gbit.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--link: expected a number of {', '.join(UNITS)}, such as 1gbit or 100mbit, got {rate!r}")
    return float(match[1]) * UNITS[match[2]] / 8


def check_memory(model: Model, device: torch.device, local: int) -> None:
    """Checks that a model can be rehearsed here.

    Args:
        model: the user's.
        device: of one rank.
        local: ranks that share the memory.

    Raises:
        UsageError: there is less memory than it needs.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        about = Path("/proc/meminfo")
        if about.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", about.read_text())):
            free = int(match[1]) * 1024
        free //= local
    if (needed := BYTES_A_PARAMETER * model.parameters) > free:
        raise UsageError(
            f"--model: expected one that fits into memory, got {model.name} of {model.parameters:,} parameters, which "
            f"needs {needed / 1e9:.1f} GB a rank of {free / 1e9:.1f} free: start fewer ranks a machine, or answer "
            "without measuring: --link, --ranks and --step-ms"
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Checks options that depend on each other.

    Raises:
        UsageError: one is missing, or out of range.
    """
    if args.model is None:
        raise UsageError(f"--model: expected {FORMS}, got none: add --model ResNet-50 --step-ms 213")
    for name in ("step_ms", "backward_ms", "price", "steps", "ranks", "ranks_per_node", "memory_gbytes", "seconds"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
    if args.price and not args.steps:
        raise UsageError("--price: expected --steps too, the length of the run, got none: add --steps 100000")
    if args.link is None:
        if started(os.environ) is None:
            raise UsageError(
                "expected a process group or --link, got neither: start it on your machines, torchrun "
                "--nproc-per-node 2 -m dgc plan --model train.py:make_model (or horovodrun, srun), or answer without "
                "them, python -m dgc plan --link 1gbit --ranks 8 --model ResNet-50 --step-ms 213"
            )
    elif not args.ranks or args.ranks < 2:
        raise UsageError("--link: expected --ranks too, 2 or more, the number of workers: add --ranks 8")
    elif args.ranks_per_node and args.ranks % args.ranks_per_node:
        raise UsageError(
            f"--ranks-per-node: expected a divisor of --ranks {args.ranks}, got {args.ranks_per_node}: nodes have to "
            "be of one size"
        )
