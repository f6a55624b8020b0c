"""The compression step on one CPU: ours against the bare update and against what PyTorch users write today.

    python -m benchmarks.kernels.ops
    python -m benchmarks.kernels.ops --device cuda    # on a GPU: see ops_cuda.py

Competitors, all on the same gradients, momentum and residual, since which pages of memory one gets decides up to a
quarter of a time: `floor`, u and v updated by a plain C++ loop and nothing selected; `dgc`, the fused op; `eager
exact`, the same step in six PyTorch calls; `topk`, torch.topk of |v| alone; `sampled`, the threshold from a 1 % sample,
as the official code estimates it, without its refinement loop (so it sends more or fewer than k). `floor Adam` and `dgc
Adam` are the first two by Adam's rule, on the same m, s and v. And unpack of 8 ranks against filling the gradient with
zeros, which the fused op does on its way.

A second table has what the wire formats add: encode and decode of one payload to the fused op, decode of 8 ranks to
their unpack. Encoding comes right behind the fused op, as in a step, with the selection still in cache; decoding and
unpacking come after all gradients have passed through the cache, as those of other buckets do.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension
from tqdm import tqdm

from benchmarks.harness import RESULTS, interleave, ratio, report, shown
from dgc import ops
from dgc.ops import Accumulation
from dgc.ops.codec import EliasFano
from dgc.ops.segments import segments_of
from dgc.step.schedule import entries

from . import ops_cuda
from .steps import ADAM, MU, EagerExact, Floor, Fused, Step

FORMATS: Mapping[str, torch.dtype | str] = {"float32": torch.float32, "8bit": "8bit", "4bit": "4bit"}
"""The types of values on the wire whose cost is measured."""
RANKS = 8
Seconds = Mapping[str, Sequence[float]]
"""Of each competitor, by round."""


def compile_floors() -> list[Callable[..., None]]:
    """Compiles floor.cpp for this machine, and returns the update of momentum and that of Adam."""
    library = Path(tempfile.mkdtemp()) / "floor.so"
    source = Path(__file__).with_name("floor.cpp")
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]
    # torch's threads: a second pool would wait for the first one's to stop spinning.
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library), *link], check=True)
    loaded = ctypes.CDLL(str(library))
    of_adam = [value for name, value in ADAM.items() if name != "c2"]

    def floor(update: Callable[..., None], tensors: int, numbers: list[float]) -> Callable[..., None]:
        types = [ctypes.c_void_p] * tensors + [ctypes.c_int64] + [ctypes.c_float] * len(numbers)
        update.argtypes = types  # type: ignore[attr-defined]
        return lambda *flat: update(*(x.data_ptr() for x in flat), flat[0].numel(), *numbers)

    return [floor(loaded.update, 3, [MU]), floor(loaded.update_adam, 4, of_adam)]


class EagerSampled(Step):
    """The threshold from a strided 1 % sample."""

    def __call__(self) -> None:
        self.u.mul_(MU).add_(self.next())
        self.v.add_(self.u)
        size = self.v.abs()
        sample = size[self.at % 100 :: 100]
        threshold = sample.topk(max(1, self.k // 100), sorted=False).values.min()
        indices = (size >= threshold).nonzero().view(-1)
        self.values = self.v[indices]
        self.v.index_fill_(0, indices, 0)
        self.u.index_fill_(0, indices, 0)


class Coded:
    """One wire format: the payload that one rank makes of a selection, and the selections made of all ranks' payloads.

    Attributes:
        received: uint8 [ranks, bytes], the payloads of all ranks.
        selections: uint8 [ranks, bytes], what was read of them.
    """

    def __init__(self, fused: Fused, values: torch.dtype | str) -> None:
        """Takes the op whose selections are encoded, and the type of the values."""
        self.fused, self.codec = fused, EliasFano(values)
        self.segments = segments_of(fused.segments)
        self.payload = torch.zeros(self.codec.nbytes(self.segments), dtype=torch.uint8)
        self.received = self.payload.repeat(RANKS, 1)
        self.selections = fused.payload.repeat(RANKS, 1)

    @property
    def entry_bytes(self) -> float:
        """The bytes of a payload over its entries."""
        return self.payload.numel() / self.fused.k

    def encode(self) -> None:
        """Makes the payload of what the op has selected last."""
        fused = self.fused
        self.codec.encode(fused.payload, self.segments, fused.workspace, fused.v, self.payload)

    def decode(self, ranks: int = RANKS) -> None:
        """Reads the payloads of the first ranks."""
        self.codec.decode(self.received[:ranks], self.segments, self.fused.workspace, self.selections[:ranks])


def compare(n: int, density: float, rounds: int, floors: list[Callable[..., None]]) -> tuple[Seconds, dict[str, float]]:
    """Times every competitor on n elements.

    Returns:
        Their seconds, and the bytes of an entry in each wire format.
    """
    k = entries(density, n)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator) for _ in range(2)]
    halves = [g.bfloat16() for g in gradients]
    kept = [g.clone() for g in [*gradients, *halves]]
    refill = partial(torch._foreach_copy_, [*gradients, *halves], kept)  # the op uses gradients up
    u, v, m, s, v_of_adam = (torch.zeros(n) for _ in range(5))
    segments = torch.tensor([[0, 0, 0, n, k]])
    fused = Fused(gradients, [u], v, segments)
    adam = Fused(gradients, [m, s], v_of_adam, segments, Accumulation.ADAM)
    selections = fused.payload.repeat(RANKS, 1)
    out, status = torch.zeros(n), torch.zeros(RANKS + 1, dtype=torch.int32)
    coded = {name: Coded(fused, values) for name, values in FORMATS.items()}

    def unpack(selections: Tensor) -> None:
        ops.unpack(selections, 0, segments, fused.workspace, fused.one, torch.float32, [out], status)

    def receive(one: Coded) -> None:
        one.decode()
        unpack(one.selections)

    competitors: dict[str, Callable[[], object]] = {
        "floor": Floor(gradients, [u], v, floors[0]),
        "dgc": fused,
        "dgc bf16": Fused(halves, [u], v, segments),
        "floor Adam": Floor(gradients, [m, s], v_of_adam, floors[1]),
        "dgc Adam": adam,
        "eager exact": EagerExact(gradients, u, v, k),
        "sampled": EagerSampled(gradients, u, v, k),
        "topk": lambda: v.abs().topk(k, sorted=False),
        "zero fill": out.zero_,
        "unpack 8": partial(unpack, selections),
    }
    for name, one in coded.items():
        competitors[f"encode {name}"] = one.encode
        competitors[f"decode {name}"] = partial(one.decode, 1)
        competitors[f"decode and unpack 8 {name}"] = partial(receive, one)
    # DGC cuts v off just above the threshold: time it on what it leaves behind, not on fresh noise.
    for step in (fused, adam):
        for _ in range(20):
            refill()
            step()
    for rank in range(RANKS):
        for one in coded.values():
            refill()
            fused()
            selections[rank] = fused.payload
            one.encode()
            one.received[rank] = one.payload
    before = {f"encode {name}": fused for name in coded}
    with tqdm(total=rounds + 1, desc=f"{n:,} elements", file=sys.stderr) as bar:
        seconds = interleave(competitors, rounds, refill, bar.update, before)
    if int(status.abs().max()):
        raise RuntimeError(f"unpack: expected payloads without an error, got the status {status.tolist()}")
    return seconds, {name: one.entry_bytes for name, one in coded.items()}


WIRE_HEADERS = (
    "elements",
    "values",
    "bytes an entry",
    "(dgc + encode + decode) / dgc",
    "(decode + unpack 8) / unpack 8",
)


def wire_rows(n: int, seconds: Seconds, entry_bytes: Mapping[str, float]) -> list[list[str]]:
    """Returns what each wire format adds at n elements, a row under WIRE_HEADERS each."""
    rows = []
    for name, nbytes in entry_bytes.items():
        added = [seconds[key] for key in ("dgc", f"encode {name}", f"decode {name}")]
        with_wire = {"all": [sum(times) for times in zip(*added, strict=True)], "dgc": seconds["dgc"]}
        received = ratio(seconds, f"decode and unpack 8 {name}", "unpack 8")
        rows.append([f"{n:,}", name, f"{nbytes:.2f}", _fine(*ratio(with_wire, "all", "dgc")), shown(*received)])
    return rows


def _fine(median: float, low: float, high: float) -> str:
    """Returns a ratio near 1 with its spread."""
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measures and reports, on the device that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="elements; 1M, 25M, 100M, or on a GPU up to 1B")
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, help="timed rounds at each size: 15, on a GPU 20")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help=f"of the report of the CPU; default: {RESULTS}")
    args = parser.parse_args()
    if args.device == "cuda":
        ops_cuda.main(args.sizes or ops_cuda.SIZES, args.density, args.rounds or ops_cuda.ROUNDS)
        return
    args.sizes, args.rounds = args.sizes or [1_000_000, 25_000_000, 100_000_000], args.rounds or 15
    torch.set_num_threads(args.threads)
    floors = compile_floors()
    rows, rows_of_wire, raw = [], [], {}
    for n in args.sizes:
        seconds, entry_bytes = compare(n, args.density, args.rounds, floors)
        raw[str(n)] = seconds
        rows_of_wire += wire_rows(n, seconds, entry_bytes)
        rows.append(
            [
                f"{n:,}",
                shown(*ratio(seconds, "dgc", "floor")),
                f"{ratio(seconds, 'dgc bf16', 'dgc')[0]:.2f}",
                *(f"{ratio(seconds, name, 'dgc')[0]:.1f}" for name in ("eager exact", "topk", "sampled")),
                shown(*ratio(seconds, "unpack 8", "zero fill")),
                shown(*ratio(seconds, "dgc Adam", "floor Adam")),
            ]
        )
    report(
        "ops_cpu",
        f"Compression step on the CPU, {args.threads} threads, density {100 * args.density:g} %: ratios of one run, "
        f"median of {args.rounds} rounds (lowest to highest). Above 1 is slower than dgc in columns 4 to 6.",
        [
            "elements",
            "dgc / floor",
            "dgc bf16 / fp32",
            "eager exact / dgc",
            "topk / dgc",
            "sampled / dgc",
            "unpack 8 / zeros",
            "Adam: dgc / floor",
        ],
        rows,
        {"density": args.density, "threads": args.threads, "seconds": raw},
        [("What the wire formats add, in the same run.", WIRE_HEADERS, rows_of_wire)],
        args.folder,
    )


if __name__ == "__main__":
    main()
