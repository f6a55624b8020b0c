"""Links: how fast the ranks exchange, measured by the collectives that training uses, at two sizes each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dgc.exchange.distributed import all_gather
from dgc.exchange.islands import IslandExchange

from .cost import Line, Node, Speeds

FEW, FEWEST = 1 << 16, 1 << 11
"""Bytes of the smaller all-reduce, and of the smaller all-gather, whose payloads are small."""
ENOUGH = 0.1
"""Seconds from which on a collective is long enough to tell the rate of a link."""
IN_A_ROW = 5
"""Small collectives in one measurement: ranks do not leave a barrier at the same moment, which would count for one."""
STEADY = 1.5
"""How many times the fastest the slowest of equal exchanges may take until a link is said to change."""

Prepared = Callable[[int], Callable[[], object]]
"""Makes a collective that each rank hands over so many bytes for."""


def half_of_backend() -> torch.dtype:
    """Returns the 16 bits of DDP's own hook: bfloat16 needs NCCL there."""
    return torch.bfloat16 if dist.get_backend() == "nccl" else torch.float16


def wait_for_device() -> None:
    """Waits until the GPU is through, where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds of something that all ranks begin together."""
    wait_for_device()
    dist.barrier()
    wait_for_device()
    begin = time.perf_counter()
    action()
    wait_for_device()
    return time.perf_counter() - begin


def slowest(seconds: Sequence[float]) -> list[float]:
    """Returns the largest of all ranks, element by element; a collective."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


@dataclass
class Probe:
    """One kind of collective, and what its two sizes took."""

    prepare: Prepared
    few: int
    """Bytes of the smaller one."""
    most: int
    """Bytes that the larger one may have."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """By bytes; of the slowest rank."""

    def find_size(self) -> None:
        """Finds a larger size that takes long enough, and warms both up."""
        size = self.few
        for _ in range(3):
            [short] = slowest([timed(self.prepare(size))])
        self.seconds[size] = []
        took = short
        while size < self.most and took < ENOUGH:
            size = min(size * (8 if took < ENOUGH / 16 else 3), self.most)
            [took] = slowest([timed(self.prepare(size))])
        self.seconds[size] = []

    def sample(self, times: int) -> None:
        """Measures both sizes so many times."""
        for size, found in self.seconds.items():
            action, repeats = self.prepare(size), IN_A_ROW if size == self.few else 1

            def in_a_row(action: Callable[[], object] = action, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    action()

            found += [seconds / repeats for seconds in slowest([timed(in_a_row) for _ in range(times)])]

    @property
    def line(self) -> Line:
        """Seconds by bytes."""
        points = [(float(size), statistics.median(found)) for size, found in self.seconds.items()]
        return Line.through(points[0], points[1]) if len(points) == 2 else Line(points[0][1], 0.0)

    @property
    def spread(self) -> tuple[int, float, float, float]:
        """Bytes of the larger size, and the median, shortest and longest seconds of it."""
        size, found = max(self.seconds.items())
        return size, statistics.median(found), min(found), max(found)

    @property
    def changes(self) -> bool:
        """Whether the longest is no exception, and far from the shortest.

        What takes a few milliseconds says more of the processor than of the link, and does not count.
        """
        size, found = max(self.seconds.items())
        return size > self.few and sorted(found)[-2] > max(STEADY * min(found), ENOUGH / 10)


class Links:
    """The links among all ranks, and inside and between nodes."""

    def __init__(self, device: torch.device, places: int, bucket: int) -> None:
        """Makes the groups of nodes; a collective.

        Args:
            device: of the gradients.
            places: ranks of a node; 1 where nodes are not to be the workers.
            bucket: bytes of the largest bucket in float32.
        """
        ranks = dist.get_world_size()
        self._device, self._places, self._nodes = device, places, ranks // places
        most, payload = max(bucket, 4 * FEW), max(bucket // 64, 4 * FEWEST)
        self.probes = {
            "all-reduce": Probe(self._all_reduce(torch.float32), FEW, most),
            "all-reduce, 16 bits": Probe(self._all_reduce(half_of_backend()), FEW, max(most // 2, 2 * FEW)),
            "all-gather": Probe(self._all_gather(None, ranks), FEWEST, payload),
        }
        if 1 < places < ranks:
            by_node = [[n * places + p for p in range(places)] for n in range(self._nodes)]
            by_place = [[n * places + p for n in range(self._nodes)] for p in range(places)]
            node, _ = dist.new_subgroups_by_enumeration(by_node)
            across, _ = dist.new_subgroups_by_enumeration(by_place)
            exchange = IslandExchange(device, across, node)
            self.probes |= {
                "mean inside a node": Probe(self._mean(exchange), FEW, most),
                "all-gather inside a node": Probe(self._all_gather(node, places), FEWEST, payload),
                "all-gather between nodes": Probe(self._all_gather(across, self._nodes), FEWEST, payload),
            }
        self._overlap = 1.0

    def find_sizes(self, say: Callable[[str], object]) -> None:
        """Finds the sizes that are measured; a collective."""
        for name, probe in self.probes.items():
            say(f"link: {name}")
            probe.find_size()

    def sample(self, times: int) -> None:
        """Measures all so many times; a collective."""
        for probe in self.probes.values():
            probe.sample(times)

    def measure_overlap(self) -> float:
        """Measures how much of an all-reduce goes on while the rank computes; a collective."""
        probe = self.probes["all-reduce"]
        size, both = max(probe.seconds), []
        alone = statistics.median(probe.seconds[size])
        matrix = torch.rand(256, 256, device=self._device)
        for _ in range(3):
            [one] = slowest([timed(lambda: _multiply(matrix, 20))])
        count = max(int(20 * alone / one), 1)
        [computing] = slowest([statistics.median(timed(lambda: _multiply(matrix, count)) for _ in range(3))])
        tensor = torch.zeros(size // 4, device=self._device)

        def together() -> None:
            work = dist.all_reduce(tensor, async_op=True)
            _multiply(matrix, count)
            assert work is not None
            work.wait()

        for _ in range(3):
            both += slowest([timed(together)])
        hidden = (alone + computing - statistics.median(both)) / min(alone, computing)
        self._overlap = min(max(hidden, 0.0), 1.0)
        return self._overlap

    @property
    def speeds(self) -> Speeds:
        """What the cost model needs."""
        lines = {name: probe.line for name, probe in self.probes.items()}
        node = None
        if "mean inside a node" in lines:
            node = Node(
                nodes=self._nodes,
                places=self._places,
                mean=lines["mean inside a node"],
                across=lines["all-gather between nodes"],
                inside=lines["all-gather inside a node"],
            )
        return Speeds(
            all_reduce=lines["all-reduce"],
            all_reduce_16=lines["all-reduce, 16 bits"],
            all_gather=lines["all-gather"],
            node=node,
            overlap=self._overlap,
            at_once=dist.get_backend() == "gloo",
        )

    def _all_reduce(self, dtype: torch.dtype) -> Prepared:
        def prepare(nbytes: int) -> Callable[[], object]:
            tensor = torch.zeros(max(nbytes // dtype.itemsize, 1), dtype=dtype, device=self._device)
            return lambda: dist.all_reduce(tensor)

        return prepare

    def _all_gather(self, group: dist.ProcessGroup | None, ranks: int) -> Prepared:
        def prepare(nbytes: int) -> Callable[[], object]:
            payload = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
            gathered = payload.new_empty(ranks * nbytes)
            return lambda: all_gather(gathered, payload, group=group)

        return prepare

    def _mean(self, exchange: IslandExchange) -> Prepared:
        def prepare(nbytes: int) -> Callable[[], object]:
            parts = torch.zeros(self._places, max(nbytes // 4 // self._places, 1), device=self._device)
            mean = torch.empty_like(parts[0])
            return lambda: exchange.mean_in_node("probe", parts, mean)()

        return prepare


def _multiply(matrix: Tensor, count: int) -> None:
    for _ in range(count):
        torch.mm(matrix, matrix)


def unsteady(probes: Mapping[str, Probe]) -> str:
    """Returns a line about collectives whose times differ too much to be believed; empty where none does."""
    found = []
    for name, probe in probes.items():
        size, median, low, high = probe.spread
        if probe.changes:
            spread = f"{1e3 * low:.1f} to {1e3 * high:.1f} ms, median {1e3 * median:.1f}"
            found.append(f"{name} of {size:,} bytes took {spread}")
    if not found:
        return ""
    return f"the link changes while it is measured: {'; '.join(found)}. Run plan again when nothing else uses it"
