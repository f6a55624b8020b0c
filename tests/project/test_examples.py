"""The examples and the launch scripts: MNIST as a user starts it, the others in forked ranks (support/programs.py)."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.harness import KEEP_FREED_MEMORY
from support.programs import run_program

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def output_of(*command: str) -> str:
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def torchrun(*arguments: str) -> str:
    return output_of("launch/torchrun.sh", "--nproc-per-node", "2", *arguments)


def forked(*arguments: str, ranks: int = 2) -> str:
    """Returns the output of a script on ranks that have what torchrun sets."""
    result = run_program(*arguments, ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def horovodrun(*arguments: str) -> str:
    pytest.importorskip("horovod.torch", reason="no Horovod here: launch/install_horovod.sh installs it")
    return output_of("launch/horovodrun.sh", "-np", "2", *arguments)


@pytest.mark.parametrize(
    ("launch_dense", "launch", "script", "library"),
    [
        (forked, torchrun, "examples/mnist.py", ""),
        (horovodrun, horovodrun, "examples/horovod_mnist.py", "Horovod, "),
    ],
)
def test_mnist_and_its_report(tmp_path, launch_dense, launch, script, library):
    logs = [tmp_path / "dense.json", tmp_path / "dgc.json"]
    launch_dense(script, "--epochs", "2", "--dense", "--log-file", str(logs[0]))
    output = launch(script, "--epochs", "2", "--density", "0.01", "--log-file", str(logs[1]))
    assert "2 of 8 parameters compressed, 99.61 % of 824,458 elements" in output
    dense, compressed = (json.loads(log.read_text()) for log in logs)
    assert dense["bytes_sent"] == 4 * 824_458
    assert 58 < dense["bytes_sent"] / compressed["bytes_sent"] < 62
    assert compressed["bytes_total"] > 124 * compressed["bytes_sent"]  # warm-up sends more
    assert dense["accuracy"][-1][0] == compressed["accuracy"][-1][0] == 124
    assert min(dense["accuracy"][-1][1], compressed["accuracy"][-1][1]) > 80
    picture = tmp_path / "curves.png"
    result = run(sys.executable, "examples/report.py", *map(str, logs), "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    assert f"\n{library}DGC 1 %, seed 0" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bible():
    output = forked("examples/bible.py", "--steps", "10")
    assert "validation perplexity" in output
    assert "bytes sent at the last step: " in output


def test_gpt():
    small = ["--width", "32", "--depth", "1", "--heads", "2", "--batch-size", "1"]
    output = forked("examples/gpt.py", "--steps", "4", *small)
    assert "step 4: validation perplexity" in output
    assert "bytes sent in the run: " in output


@pytest.mark.parametrize(
    ("launch", "ranks", "islands"), [(torchrun, 2, []), (partial(forked, ranks=4), 4, ["--nodes", "2"])]
)
def test_local_steps_gpt(launch, ranks, islands):
    small = ["--width", "32", "--depth", "1", "--heads", "2", "--batch-size", "1"]
    output = launch("examples/local_steps_gpt.py", "--steps", "5", "--every", "2", *small, *islands)
    assert "validation perplexity" in output
    assert f"{ranks} ranks, weights equal on all: True" in output
    assert "3 rounds; bytes a step to other islands: " in output


@pytest.mark.parametrize("dense", [[], ["--dense"]])
def test_fsdp2_gpt(dense):
    small = ["--width", "32", "--depth", "1", "--batch-size", "1"]
    script = ["examples/fsdp2_gpt.py", "--nodes", "2", "--steps", "3", *small, *dense]
    output = forked(*script, ranks=4)
    assert "validation loss " in output
    assert "2 nodes of 2 ranks, parameters equal on all: True" in output
    assert ("bytes from this rank to other nodes: " in output) == (not dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "2"], "--density: expected a number in (0, 1], got 2"),
        (["--epochs", "0"], "--epochs: expected an integer >= 1, got 0"),
        (["--seed"], "--seed: expected a value"),
        (["--colour", "red"], "unknown option --colour"),
    ],
)
def test_quickstart_checks_its_options_before_it_installs_anything(arguments, message):
    result = run("launch/quickstart.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    "script", ["quickstart.sh", "local_steps.sh", "torchrun.sh", "install_horovod.sh", "horovodrun.sh", "test.sh"]
)
def test_launch_scripts_explain_themselves(script):
    result = run(f"launch/{script}", "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout


def fake_python(folder: Path, body: str) -> str:
    """Returns the path of a Python that does what the shell script body says."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [("exit 1", "has no torch"), ("echo 2 0; exit 1", "has no Horovod that works with its torch")],
)
def test_horovodrun_says_what_is_missing_and_what_installs_it(tmp_path, body, message):
    result = run("launch/horovodrun.sh", "script.py", PYTHON=fake_python(tmp_path, body))
    assert result.returncode == 1
    assert message in result.stderr
    assert "launch/install_horovod.sh" in result.stderr


ELASTIC = "-np 2 --min-np 2 --max-np 4 --host-discovery-script ./hosts.py"


@pytest.mark.parametrize(
    ("given", "started", "threads"),
    [
        ("a.py -np 3 b.py", "-np 8 PYTHON a.py -np 3 b.py", "1"),
        ("-np 2 --verbose a.py", "-np 2 --verbose PYTHON a.py", "4"),
        ("--num-proc=3 a.py", "--num-proc=3 PYTHON a.py", "2"),
        ("-np 8 -H h1:4,h2:4 a.py", "-np 8 -H h1:4,h2:4 PYTHON a.py", "2"),
        ("-np 8 --hosts=h1:2,h2:6 a.py", "-np 8 --hosts=h1:2,h2:6 PYTHON a.py", "4"),
        ("-np 8 --hostfile f a.py", "-np 8 --hostfile f PYTHON a.py", ""),
        (f"{ELASTIC} a.py", f"{ELASTIC} PYTHON a.py", ""),
        ("-np 2 python3 -u a.py", "-np 2 python3 -u a.py", "4"),
        ("--check-build", "-np 8 --check-build", "1"),
    ],
)
def test_horovodrun_adds_what_is_not_given(tmp_path, given, started, threads):
    python = fake_python(tmp_path, 'if [ "$1" = -c ]; then echo 8 0; else echo "$OMP_NUM_THREADS" "$@"; fi')
    result = run("launch/horovodrun.sh", *given.split(), PYTHON=python, OMP_NUM_THREADS="")
    assert result.stdout == f"{threads} -m horovod.runner.launch {started.replace('PYTHON', python)}\n"


@pytest.mark.parametrize("script", ["torchrun.sh", "horovodrun.sh"])
@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [(0, "", "268435456 33554432"), (0, "7", "7 33554432"), (1, "", " "), (1, "7", "7 ")],
)
def test_launchers_have_freed_gradients_kept_where_there_is_no_gpu(tmp_path, script, gpus, given, expected):
    assert " ".join(KEEP_FREED_MEMORY.values()) == "268435456 33554432"  # what the benchmarks use
    settings = "$MALLOC_TRIM_THRESHOLD_ $MALLOC_MMAP_THRESHOLD_"
    python = fake_python(tmp_path, f'if [ "$1" = -c ]; then echo 8 {gpus}; else echo "{settings}"; fi')
    set_by_user = {"MALLOC_TRIM_THRESHOLD_": given, "MALLOC_MMAP_THRESHOLD_": ""}
    assert run(f"launch/{script}", "a.py", PYTHON=python, **set_by_user).stdout == expected + "\n"


def test_launchers_choose_the_activated_environment_and_else_the_one_made_here(tmp_path):
    made, activated = tmp_path / "made", tmp_path / "activated"
    for venv in (made, activated):
        (venv / "bin").mkdir(parents=True)
        fake_python(venv / "bin", f'if [ "$1" = -c ]; then echo 8 0; else echo {venv.name}; fi')
    for script in ("torchrun.sh", "horovodrun.sh"):
        choice = {"PYTHON": "", "CONDA_DEFAULT_ENV": "", "DGC_VENV": str(made)}
        assert run(f"launch/{script}", "a.py", **choice, VIRTUAL_ENV="").stdout == "made\n"
        assert run(f"launch/{script}", "a.py", **choice, VIRTUAL_ENV=str(activated)).stdout == "activated\n"


def framework(name):
    if find_spec(name) is None:  # to import it would take seconds
        pytest.skip(f"NOT TESTED: examples/{name}_*.py, since {name} is not installed")


def test_accelerate_mlp(tmp_path):
    framework("accelerate")
    output = forked("examples/accelerate_mlp.py", "--epochs", "1", "--folder", str(tmp_path))
    assert re.search(r"test loss \d\.\d+, step 32, \d+ bytes a step", output)


def test_lightning_mlp(tmp_path):
    framework("lightning")
    folder = ["--folder", str(tmp_path)]
    output = output_of(sys.executable, "examples/lightning_mlp.py", "--devices", "2", "--epochs", "1", *folder)
    assert "2 of 6 parameters compressed, density 0.01, step 32" in output
    assert " bytes a step" in output


def test_transformers_gpt2(tmp_path):
    framework("transformers")
    output = forked("examples/transformers_gpt2.py", "--steps", "10", "--folder", str(tmp_path))
    assert "dgc: clip_norm=1, and max_grad_norm, which was 1, is 0" in output
    assert "9 of 28 parameters compressed" in output
    assert re.search(r"test loss \d\.\d+, \d+ bytes a step", output)


def test_framework_examples_are_short():
    long = {
        path.name: lines
        for name in ("accelerate", "lightning", "ray", "transformers")
        for path in (ROOT / "examples").glob(f"{name}_*.py")
        if (lines := len(path.read_text().splitlines())) > 60
    }
    assert long == {}


def test_rollback_has_the_weights_of_a_run_without_the_batch():
    went_back = forked("examples/rollback_mnist.py", "--epochs", "2")
    assert re.search(r"loss [\d.]+ at batch 70: back to batch 50, and on without it", went_back)
    without = forked("examples/rollback_mnist.py", "--epochs", "2", "--leave-out", "70")
    assert "back to batch" not in without
    weights = [re.search(r"weights (\w{8})", output)[1] for output in (went_back, without)]
    assert weights[0] == weights[1]


def test_tracked_mnist_says_which_trackers_it_has(tmp_path):
    output = forked("examples/tracked_mnist.py", "--epochs", "1", "--folder", str(tmp_path))
    for package, name in (("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")):
        assert (f"{name} is left out: pip install {package}" in output) == (find_spec(package) is None)
    assert re.search(r"test accuracy [\d.]+ %, [\d,]+ bytes sent, \d trackers", output)
