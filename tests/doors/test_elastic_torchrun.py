"""examples/elastic_mnist.py under torchrun, whose workers are killed: real processes, real SIGKILL.

DGC_KILLS=10 pytest tests/doors/test_elastic_torchrun.py kills ten times instead of twice.
"""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("DGC_KILLS", 2))
SAVE_EVERY = 5
RESUMED = r"resumed from \S*step(\d+): epoch (\d+), image (\d+); residual (\S+)"


class Training:
    """A run of torchrun until its end, and what it left."""

    def __init__(self, folder, workers, kills, *options):
        folder.mkdir(exist_ok=True)
        self.checkpoints = folder / "checkpoints"
        (folder / "kills.json").write_text(json.dumps(kills))
        command = [
            *("launch/torchrun.sh", "--nnodes", "1:1", "--nproc-per-node", str(workers)),
            *("--max-restarts", str(len(kills)), "tests/support/mortal_worker.py", str(folder), *options),
            *("--density", "0.01", "--folder", str(self.checkpoints), "--save-every", str(SAVE_EVERY)),
            *("--log-file", str(folder / "log.json")),
        ]
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as torchrun:
            try:
                self.output, _ = torchrun.communicate(timeout=150 + 30 * len(kills))
            except subprocess.TimeoutExpired:
                torchrun.terminate()  # it ends its workers then; killed, it would leave them
                self.output, _ = torchrun.communicate()
        (folder / "output.txt").write_text(self.output)
        assert torchrun.returncode == 0, self.output[-6000:]
        self.record = json.loads((folder / "log.json").read_text())
        self.accuracy = self.record["accuracy"][-1][1]
        self.resumed = re.findall(RESUMED, self.output)

    def steps(self):
        """The steps of the checkpoints that are there."""
        return [int(path.name.removeprefix("step")) for path in sorted(self.checkpoints.iterdir())]

    def saved(self, step):
        """What all ranks have alike, and momentum and residual by rank."""
        folder = self.checkpoints / f"step{step:06d}"
        dcp_to_torch_save(folder / "dgc", folder / "dgc.pt")
        ranks = torch.load(folder / "dgc.pt", weights_only=True)
        return torch.load(folder / "rest.pt", weights_only=True), ranks


# three workers

EPOCHS, STEPS = 2, 2 * 41


def random_kills(seed):
    """A kill in each of KILLS equal parts of the run, so that each start gets further than the one before."""
    rng = random.Random(seed)
    first = 2 * SAVE_EVERY  # a checkpoint is there, even if the next one breaks off
    bounds = [first + i * (STEPS - first) // KILLS for i in range(KILLS + 1)]
    kills = []
    for (begin, end), place in zip(itertools.pairwise(bounds), itertools.cycle(["save", "saved", "backward"])):
        step = rng.choice([s for s in range(begin, end) if place == "backward" or s % SAVE_EVERY == 0])
        kills.append([rng.randrange(3), step, place])
    return kills


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    kills = random_kills(0)
    return kills, Training(tmp_path_factory.mktemp("killed"), 3, kills, "--epochs", str(EPOCHS))


@pytest.mark.timeout(600)
def test_a_run_survives_its_workers(killed, tmp_path):
    kills, run = killed
    print(kills)
    saved = dict(re.findall(r"saved \S*step(\d+): residual (\S+)", run.output))
    assert len(run.resumed) == len(kills)
    for (step, epoch, image, residual), (_, died, place) in zip(run.resumed, kills, strict=True):
        complete = died - 1 if place == "save" else died  # of that step there is only rest.pt
        assert int(step) == complete - complete % SAVE_EVERY
        assert (int(epoch), int(image)) == (int(step) // 41, int(step) % 41 * 3 * 32)
        assert residual == saved.get(step, residual)  # rank 0 may have died before it said so
        assert float(residual) > 1
    assert run.steps() == [STEPS - STEPS % SAVE_EVERY, STEPS]
    assert [step for step, _ in run.record["accuracy"]] == [41, 82]

    whole = Training(tmp_path, 3, [], "--epochs", str(EPOCHS))
    assert whole.resumed == []
    assert whole.steps() == run.steps()
    # Not the same: DDP's first step after a start has other buckets. One test image is 0.1 points.
    assert run.record["bytes_total"] == pytest.approx(whole.record["bytes_total"], rel=1e-4)
    print(f"{len(kills)} kills: {run.accuracy} %, without: {whole.accuracy} %")
    assert whole.accuracy > 75
    assert abs(run.accuracy - whole.accuracy) <= 1


def test_two_workers_go_on_where_three_stopped(killed, tmp_path):
    _, three = killed
    step = f"step{STEPS - STEPS % SAVE_EVERY:06d}"
    folder = tmp_path / "checkpoints"
    shutil.copytree(three.checkpoints / step, folder / step)
    broken = folder / "step000999"  # a save that broke off
    (broken / "dgc.partial").mkdir(parents=True)
    shutil.copy(folder / step / "rest.pt", broken)
    _, ranks = three.saved(int(step[4:]))

    two = Training(tmp_path, 2, [], "--epochs", str(EPOCHS))
    [(resumed, epoch, image, residual)] = two.resumed
    assert (resumed, int(epoch), int(image)) == (step[4:], 1, (STEPS - STEPS % SAVE_EVERY - 41) * 3 * 32)
    names = [key.removeprefix("rank0.residual.") for key in ranks if key.startswith("rank0.residual.")]
    share = [2 / 3 * ranks[f"rank0.residual.{n}"] + 1 / 3 * ranks[f"rank1.residual.{n}"] for n in names]
    assert float(residual) == pytest.approx(torch.cat([t.flatten() for t in share]).norm().item(), rel=1e-4)
    left = (4000 - int(image)) // (2 * 32)
    assert two.steps() == [int(step[4:]), int(step[4:]) + left]
    assert [step for step, _ in two.record["accuracy"]] == [41, two.steps()[-1]]
    assert abs(two.accuracy - three.accuracy) <= 1


# two workers


def test_a_killed_run_of_two_workers_has_the_bits_of_one_that_was_not(tmp_path):
    options = ("--epochs", "1", "--warmup-steps", "50")  # killed in the middle of warm-up
    whole = Training(tmp_path / "whole", 2, [], *options)
    killed = Training(tmp_path / "killed", 2, [[1, 43, "backward"]], *options)
    assert [(step, epoch, image) for step, epoch, image, _ in killed.resumed] == [("000040", "0", str(40 * 2 * 32))]
    for step in (60, 62):
        (rest, ranks), (killed_rest, killed_ranks) = whole.saved(step), killed.saved(step)
        for name, parameter in rest["model"].items():
            assert torch.equal(parameter, killed_rest["model"][name]), name
        assert ranks.keys() == killed_ranks.keys()
        assert sum(".residual." in key for key in ranks) == 2 * 2
        assert sum(".momentum." in key for key in ranks) == 2 * 8
        for key, tensor in ranks.items():
            assert tensor.any(), key
            assert torch.equal(tensor, killed_ranks[key]), key
        assert torch.equal(
            torch.cat([t["decay_momentum"].flatten() for t in rest["optimizer"]["state"].values()]),
            torch.cat([t["decay_momentum"].flatten() for t in killed_rest["optimizer"]["state"].values()]),
        )
        assert rest["optimizer"]["param_groups"] == killed_rest["optimizer"]["param_groups"]  # with the learning rate
    assert whole.record["accuracy"] == killed.record["accuracy"]
