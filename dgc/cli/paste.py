"""Paste: the lines of a training script that take the way which a forecast recommends."""

from __future__ import annotations

from .forecast import DENSITIES, FLOAT32, Forecast

HALVES = {"bf16": "bfloat16", "fp16": "float16"}
"""DGCConfig.dense_wire_dtype of the 16 bits that DDP has a hook for."""
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
DECIDES = "(docs/choosing.md, Let it decide)"


def advice(chosen: Forecast, auto: bool) -> str:
    """Returns a line on DGCConfig.exchange "auto" to print below the others; empty where nodes are the workers.

    Args:
        chosen: the way to take.
        auto: whether the lines have it already.
    """
    if chosen.nodes:
        return ""
    if auto:
        return (
            f'exchange="auto" times dense and compressed steps while you train, and takes the quicker ones {DECIDES}.'
        )
    when = "slower" if chosen.density is None else "faster"
    config = 'dgc.DGCConfig(exchange="auto")' if chosen.density is None else 'exchange="auto" in DGCConfig'
    return f"Where the link may be {when} at times, {config} times both kinds of step and takes the quicker {DECIDES}."


def ddp_lines(chosen: Forecast, steps: int | None, half: str = "bf16", auto: Forecast | None = None) -> str:
    """Returns what to paste into a training script of DDP.

    Args:
        chosen: the way to take.
        steps: of the run; None where unknown.
        half: the 16 bits that DDP has a hook for: bf16 over NCCL, fp16 over gloo.
        auto: the dense way that DGCConfig.exchange "auto" is to try too; None without it.
    """
    if chosen.density is None:
        if chosen.name.endswith(FLOAT32):
            return "model = DistributedDataParallel(net)  # as it is: neither 16 bits nor dgc gain anything here"
        return (
            f"from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import {half}_compress_hook\n\n"
            "model = DistributedDataParallel(net)\n"
            f"model.register_comm_hook(None, {half}_compress_hook)"
        )
    config, note = _config(chosen, steps, half, auto)
    mesh = ', mesh="auto"' if chosen.nodes else ""
    return (
        "import dgc\n\n"
        "model = DistributedDataParallel(net)\n"
        f"{note}optimizer = dgc.attach(model, optimizer, {config}{mesh})"
    )


def horovod_lines(chosen: Forecast, optimizer: str, steps: int | None, auto: Forecast | None = None) -> str:
    """Returns what to paste into a training script of Horovod, whose 16 bits are float16.

    Args:
        chosen: the way to take.
        optimizer: a key of OPTIMIZERS.
        steps: of the run; None where unknown.
        auto: the dense way that DGCConfig.exchange "auto" is to try too; None without it.
    """
    if chosen.density is None:
        named = "optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters()"
        if chosen.name.endswith(FLOAT32):
            return f"{named})  # as it is: neither 16 bits nor dgc gain anything here"
        return f"{named}, compression=hvd.Compression.fp16)"
    config, note = _config(chosen, steps, "fp16", auto)
    dynamic, nodes = ('process_sets="dynamic"', ', nodes="auto"') if chosen.nodes else ("", "")
    return (
        "import dgc.horovod\n\n"
        f"hvd.init({dynamic})\n"
        f"optimizer = dgc.{OPTIMIZERS[optimizer]}(model.parameters(), ...)  # in place of torch.optim's\n"
        f"{note}compressor = dgc.horovod.DGCCompressor({config})\n"
        f"optimizer = dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters(), compressor{nodes})"
    )


def _config(chosen: Forecast, steps: int | None, half: str, auto: Forecast | None) -> tuple[str, str]:
    """Returns the configuration, and a comment to stand above it."""
    options, note = [f"density={chosen.density:g}"], ""
    if chosen.density is not None and chosen.density < DENSITIES[0]:
        options.append(f"warmup_steps={round(0.04 * steps) if steps else 2000}")
        note = f"# The warm-up: 4 % of {'the' if steps else 'your'} run; of a language model's half of it.\n"
    if auto is not None:
        options.append('exchange="auto"')
        if not auto.name.endswith(FLOAT32):
            options.append(f'dense_wire_dtype="{HALVES[half]}"')
    return f"dgc.DGCConfig({', '.join(options)})", note
