"""Log messages: the kernels in use, what is compressed from a step on, and steps that are left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from dgc import ops
from dgc.memory.slots import Slot
from dgc.stats import Choice

from .phase import Phase
from .schedule import DensitySchedule

logger = logging.getLogger("dgc")


def log_backend(device_type: str) -> None:
    """Logs which kernels run the ops on a GPU."""
    choice = ops.backend(device_type)
    if choice == "reference":
        logger.warning(
            "dgc: no kernels for %s, so plain PyTorch is used: correct, but slow. Reinstall where nvcc is, or "
            "`pip install '.[cupy]'`, with which they are compiled at first use",
            device_type,
        )
    else:
        how = "built with the package" if choice == "native" else "compiled at first use by CuPy"
        logger.info("dgc: %s kernels %s", device_type, how)


def log_alone() -> None:
    """Warns where a launcher has started several ranks that are about to train apart, without a process group."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1" and not dist.is_initialized():
        logger.warning(
            "dgc: WORLD_SIZE is %s, but torch.distributed is not initialised, so each process trains alone. Call "
            "torch.distributed.init_process_group(); a framework that has made none takes the CPU by "
            "Accelerator(cpu=True) or TrainingArguments(use_cpu=True)",
            ranks,
        )


def log_phase(phase: Phase, slots: Mapping[str, Slot], schedule: DensitySchedule, step: int, off: bool) -> None:
    """Logs what is compressed from this step on; warns where nothing is, though warm-up is over and DGC is on."""
    warming_up = schedule.warming_up(step)
    nothing = len(phase.dense) == len(slots) and not warming_up
    warmup = schedule.warmup_steps - step if warming_up else 0
    logger.log(
        logging.WARNING if nothing and not off else logging.INFO,
        "dgc: step %d, %s%s",
        step,
        phase.describe(slots),
        f"; {100 * schedule.final:.4g} % after {warmup} more steps of warm-up" if warmup else "",
    )


def log_masked(names: Sequence[str]) -> None:
    """Logs a hint for parameters that seem to have a mask of torch's, by their names."""
    _hint_at_masks([name for name in names if _masked(name)])


def log_masked_since(names: Mapping[str, str]) -> None:
    """Logs the hint for parameters that the model holds under another name by now, since torch has masked them.

    Args:
        names: the present names, by those of the state.
    """
    _hint_at_masks([name for name, now in names.items() if _masked(now) and not _masked(name)])


def _masked(name: str) -> bool:
    return name.endswith("_orig") or ".parametrizations." in f".{name}"


def _hint_at_masks(found: Sequence[str]) -> None:
    if found:
        logger.info(
            "dgc: %s: if torch.nn.utils.prune or a parametrization masks them, tell it by state.mask(name, mask), or "
            "what waits of masked weights comes back where they grow again",
            ", ".join(found[:5]),
        )


def log_choice(choice: Choice, before: bool | None) -> None:
    """Logs which exchange a trial has chosen, with its figures.

    Args:
        choice: the new one.
        before: whether steps were dense by an earlier trial; None without one.
    """
    ways = {True: "dense", False: "compressed"}
    logger.info(
        "dgc: step %d, density %.4g %%: a dense step takes %.3g ms, a compressed one %.3g ms: %s steps from here on%s; "
        "next trial at step %d",
        choice.step,
        100 * choice.density,
        choice.dense_ms,
        choice.sparse_ms,
        ways[choice.dense],
        "" if before is None else ", as before" if before == choice.dense else f", {ways[before]} ones before",
        choice.again,
    )


def log_skipped(step: int, found: Sequence[str], expected: bool) -> None:
    """Logs that a step was left out on all ranks; warns unless that is expected, from a GradScaler."""
    logger.log(
        logging.INFO if expected else logging.WARNING,
        "dgc: step %d left out on all ranks, gradients not finite: %s",
        step,
        "; ".join(found),
    )
