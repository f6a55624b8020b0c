"""The examples and the launch scripts, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def torchrun(*arguments: str) -> str:
    result = run("launch/torchrun.sh", "--nproc-per-node", "2", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_mnist_and_its_report(tmp_path):
    logs = [tmp_path / "dense.json", tmp_path / "dgc.json"]
    torchrun("examples/mnist.py", "--epochs", "2", "--dense", "--log-file", str(logs[0]))
    output = torchrun("examples/mnist.py", "--epochs", "2", "--density", "0.01", "--log-file", str(logs[1]))
    assert "2 of 8 parameters compressed, 99.61 % of 824,458 elements" in output
    dense, compressed = (json.loads(log.read_text()) for log in logs)
    assert dense["bytes_sent"] == 4 * 824_458
    assert 50 < dense["bytes_sent"] / compressed["bytes_sent"] < 55
    assert compressed["bytes_total"] > 124 * compressed["bytes_sent"]  # warm-up sends more
    assert dense["accuracy"][-1][0] == compressed["accuracy"][-1][0] == 124
    assert min(dense["accuracy"][-1][1], compressed["accuracy"][-1][1]) > 80
    picture = tmp_path / "curves.png"
    result = run(sys.executable, "examples/report.py", *map(str, logs), "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    assert "DGC 1 %, seed 0" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bible():
    output = torchrun("examples/bible.py", "--steps", "10")
    assert "validation perplexity" in output
    assert "bytes sent at the last step: " in output


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


@pytest.mark.parametrize("script", ["quickstart.sh", "torchrun.sh", "test.sh"])
def test_launch_scripts_explain_themselves(script):
    result = run(f"launch/{script}", "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout
