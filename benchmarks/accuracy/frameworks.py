"""The examples of other frameworks, dense and with DGC: the loss on data that were not trained on, over seeds.

    python -m benchmarks.accuracy.frameworks

Each example runs on two CPU processes, as a user starts it, once with --dense and once without for every seed. A
framework that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from benchmarks.harness import ROOT, report

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES = {
    "lightning": ("examples/lightning_mlp.py", "--devices", "2"),
    "accelerate": (*TORCHRUN, "examples/accelerate_mlp.py"),
    "transformers": (*TORCHRUN, "examples/transformers_gpt2.py", "--steps", "300"),
    "ray": ("examples/ray_mlp.py",),
}
LOSS = re.compile(r"(?:test loss|loss)'?\s*[:│ ]\s*([0-9.]+)")


def loss_and_bytes(name: str, seed: int, dense: bool) -> tuple[float, int]:
    """Returns what an example prints at its end: the loss, and the bytes of its last step, 0 for a dense one.

    Raises:
        RuntimeError: it failed, or printed no loss.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *EXAMPLES[name], "--folder", folder, "--seed", str(seed)]
        command += ["--dense"] if dense else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = LOSS.findall(result.stdout)
    if result.returncode or not found:
        raise RuntimeError(f"{name}, seed {seed}: expected a loss, got {result.stdout[-500:]}{result.stderr[-2000:]}")
    sent = re.findall(r"(\d+) bytes a step|'bytes a step': (\d+)", result.stdout)
    return float(found[-1]), max((int(a or b) for a, b in sent), default=0)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="frameworks")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", default="frameworks", help="name under results/ (default: %(default)s)")
    args = parser.parse_args()
    there = [name for name in args.only if find_spec(name)]
    for name in set(args.only) - set(there):
        print(f"NOT MEASURED: {name}, which is not installed", file=sys.stderr)
    raw: dict[str, Any] = {}
    rows = []
    with tqdm(total=2 * args.seeds * len(there), file=sys.stderr) as bar:
        for name in there:
            raw[name] = {"dense": [], "dgc": [], "bytes": []}
            for seed in range(args.seeds):
                for kind in ("dense", "dgc"):
                    loss, sent = loss_and_bytes(name, seed, kind == "dense")
                    raw[name][kind].append(loss)
                    raw[name]["bytes"] += [sent] if sent else []
                    bar.update()
            dense, ours = raw[name]["dense"], raw[name]["dgc"]
            differences = [b - a for a, b in zip(dense, ours, strict=True)]
            means = [f"{statistics.mean(losses):.3f}" for losses in (dense, ours)]
            spread = f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
            rows.append([name, *means, spread, f"{raw[name]['bytes'][0]:,}" if raw[name]["bytes"] else "-"])
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
