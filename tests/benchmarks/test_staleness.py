"""benchmarks/accuracy/staleness.py: ages against a count by hand, and the report that is made of them."""

import json

import pytest
import torch

import dgc
from benchmarks.accuracy import data, replicas, staleness, tasks
from benchmarks.accuracy.staleness import Ages, Watched
from dgc.ops.codec import EliasFano


@pytest.fixture(autouse=True)
def _one_thread():
    """Keeps networks this small on one thread, as the program does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 30, generator=generator)
    targets = (inputs[:, :3] + 0.3 * torch.randn(300, 3, generator=generator)).argmax(1)
    return data.Data(inputs[:200], targets[:200], inputs[200:], targets[200:])


def network():
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))


TASK = tasks.Task("test", "accuracy", samples, network, lr=0.05)
STEPS, DENSITY, COMPRESSED = 30, 0.05, (1200, 120)


def test_ages_are_those_of_the_entries_that_left_the_residual():
    watched = [Watched(EliasFano(), STEPS) for _ in range(replicas.WORKERS)]
    trainers = []

    class Seen(replicas.DGC):
        """Notes where v is zero after each step: without rounding, exactly where something was sent."""

        def __init__(self, network, task):
            super().__init__(network, task, dgc.DGCConfig(DENSITY, dense_below=100), watched)
            trainers.append(self)
            self.zero = []

        def learn(self, batches):
            super().learn(batches)
            self.zero.append(torch.stack([state.memory.residual == 0 for state in self.states]))

    replicas.train(TASK, Seen, 0, STEPS)
    zero = torch.stack(trainers[0].zero)  # [steps, workers, elements of memory]
    compressed = ~zero.all(0).all(0)  # v of what stays dense is zero for ever
    for rank in range(replicas.WORKERS):
        sent, left = [0] * (STEPS + 1), [0] * (STEPS + 1)
        for element in compressed.nonzero().flatten().tolist():
            last = 0
            for step in (zero[:, rank, element].nonzero().flatten() + 1).tolist():
                sent[step - last] += 1
                last = step
            left[STEPS - last] += 1
        assert watched[rank].ages() == Ages(sent, left)
        assert sum(sent) == STEPS * sum(round(DENSITY * n) for n in COMPRESSED)
        assert sum(left) == sum(COMPRESSED)
        assert sent[0] == 0 < left[-1]


def test_watching_does_not_change_training():
    def trained(codecs):
        made = []

        def make(network, task):
            made.append(replicas.DGC(network, task, dgc.DGCConfig(DENSITY, dense_below=100, wire_dtype="8bit"), codecs))
            return made[0]

        replicas.train(TASK, make, 0, 10)
        return [p.detach() for p in made[0].network.parameters()]

    watched = [Watched(EliasFano("8bit"), 10) for _ in range(replicas.WORKERS)]
    for one, other in zip(trained([None] * replicas.WORKERS), trained(watched), strict=True):
        assert torch.equal(one, other)
    assert sum(watched[0].sent) == 10 * sum(round(DENSITY * n) for n in COMPRESSED)


@pytest.mark.parametrize(("share", "age"), [(0.5, 2), (0.51, 3), (0.99, 7), (0.0001, 1)])
def test_quantiles_by_hand(share, age):
    assert staleness.quantile([0, 40, 10, 45, 0, 0, 0, 5], share) == age


def test_bars_hold_everything():
    edges = staleness.edges_of(100)
    assert edges == [0, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 101]
    counts = [1] * 101
    assert staleness.binned(counts, edges)[:4] == [2 / 101, 1 / 101, 1 / 101, 2 / 101]
    assert sum(staleness.binned(counts, edges)) == pytest.approx(1)


def test_the_report_says_what_was_counted(tmp_path):
    steps = 100
    few, many = [0] * (steps + 1), [0] * (steps + 1)
    few[1], few[10], many[20] = 30, 70, 100
    left = [0] * (steps + 1)
    left[5], left[-1] = 60, 40
    ages = {0.01: [Ages(few, left)], 0.001: [Ages(few, left), Ages(many, left)]}
    staleness.tell({"mnist": ages}, 1, steps, tmp_path)
    rows = [line for line in (tmp_path / "staleness.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == [*staleness.HEADERS]
    assert cells[1] == ["1 %", "10 (10 to 10)", "10", "10", "30.0 %", "5 (5 to 5)", "40.0 %"]
    assert cells[2] == ["0.1 %", "10 (10 to 20)", "20", "20", "15.0 %", "5 (5 to 5)", "40.0 %"]
    raw = json.loads((tmp_path / "staleness.json").read_text())
    assert sum(raw["shares"]["mnist"]["0.001"]["sent"]) == pytest.approx(1)
    assert raw["shares"]["mnist"]["0.01"]["left"][-1] == 0.4
    assert (tmp_path / "staleness.png").stat().st_size > 10_000
