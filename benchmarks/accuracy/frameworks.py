"""The examples of other frameworks, dense and with DGC: the loss on data that were not trained on, over seeds.

    python -m benchmarks.accuracy.frameworks

Each example runs on two CPU processes, with --dense and without for every seed, all of them in the same processes,
since these take longer to start than to train. A framework that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import product
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from benchmarks.harness import ROOT, report, result_name

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lightning": (TORCHRUN, ("examples/lightning_mlp.py", "--devices", "2")),
    "accelerate": (TORCHRUN, ("examples/accelerate_mlp.py",)),
    "transformers": (TORCHRUN, ("examples/transformers_gpt2.py", "--steps", "300")),
    "ray": ((), ("examples/ray_mlp.py",)),
}
"""How Python starts the processes of each, and the script with its arguments."""
LOSS = re.compile(r"(?:test loss'?:?| loss +│) +([0-9.]+)")
BYTES = re.compile(r"(\d+) bytes a step|'bytes a step': (\d+)")
MARK = "run of seed"


def run_all(name: str, seeds: int) -> None:
    """Runs an example for all seeds, dense and with DGC, in this process and its peers."""
    with patch.object(dist, "destroy_process_group"):  # the next run goes on with the group
        for seed, kind in product(range(seeds), ("--dense", "")):
            if "accelerate" in sys.modules:
                sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
            script, *arguments = EXAMPLES[name][1]
            folder = os.environ["DGC_FOLDER"] + f"/{seed}{kind}"  # the same on all ranks
            sys.argv = [script, *arguments, "--folder", folder, "--seed", str(seed), *([kind] if kind else [])]
            if os.environ.get("RANK", "0") == "0":
                print(f"\n{MARK} {seed} {kind}", flush=True)
            runpy.run_path(str(ROOT / script), run_name="__main__")
            sys.stdout.flush()
    if dist.is_initialized():  # a process that ended with gloo's group would end by a signal, now and then
        dist.barrier()
        dist.destroy_process_group()


def measured(name: str, seeds: int) -> dict[str, list[float]]:
    """Returns the losses of an example, dense and with DGC, and the bytes of the last step with it.

    Raises:
        RuntimeError: it failed, or printed no loss.
    """
    command = [sys.executable, *EXAMPLES[name][0], __file__, "--inside", name, "--seeds", str(seeds)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DGC_FOLDER": folder}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    runs = [(LOSS.findall(text), BYTES.findall(text), text) for text in result.stdout.split(MARK)[1:]]
    if result.returncode or len(runs) != 2 * seeds or not all(losses for losses, *_ in runs):
        raise RuntimeError(f"{name}: expected losses, got {result.stdout[-500:]}{result.stderr[-2000:]}")
    losses = [float(losses[-1]) for losses, *_ in runs]
    sent = [float(max(map(int, filter(None, found[-1])))) for _, found, _ in runs[1::2] if found]
    return {"dense": losses[::2], "dgc": losses[1::2], "bytes": sent}


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="frameworks")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--out", type=result_name, default="frameworks", help="name under results/ (default: %(default)s)"
    )
    parser.add_argument("--inside", choices=EXAMPLES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_all(args.inside, args.seeds)
        return
    raw: dict[str, Any] = {}
    rows = []
    for name in args.only:
        if not find_spec(name):
            print(f"NOT MEASURED: {name}, which is not installed", file=sys.stderr)
            continue
        raw[name] = found = measured(name, args.seeds)
        differences = [ours - dense for dense, ours in zip(found["dense"], found["dgc"], strict=True)]
        means = [f"{statistics.mean(found[kind]):.3f}" for kind in ("dense", "dgc")]
        spread = f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
        rows.append([name, *means, spread, f"{found['bytes'][0]:,.0f}"])
        print(rows[-1], file=sys.stderr)
    report(
        args.out,
        f"The examples of other frameworks on two processes, {args.seeds} seeds: mean test loss, and the difference "
        "of the same seeds (lowest to highest). Bytes: of a step at 1 %, state.stats.bytes_sent of rank 0.",
        ["example", "dense", "DGC, 1 %", "difference", "bytes a step"],
        rows,
        raw,
    )


if __name__ == "__main__":
    main()
