"""`python -m dgc plan`: what it reads, what it refuses and how, and a run on two ranks."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

import dgc.cli.report
from benchmarks.harness import ROOT
from dgc.cli.main import main
from dgc.cli.models import load, parse_shapes
from dgc.cli.ranks import UsageError
from dgc.cli.shapes import NETWORKS

PAPER = ["plan", "--link", "1gbit", "--ranks", "8"]


@pytest.fixture(autouse=True)
def nobody_started_this(monkeypatch):
    for name in ("RANK", "HOROVOD_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_importing_dgc_leaves_the_commands_out():
    check = "import sys, dgc; print([m for m in sys.modules if m.startswith('dgc.cli') or m == 'matplotlib'])"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_answer_without_machines(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    model = ["--model", "4096x4096,4096", "--step-ms", "100", "--latency-us", "0", "--share", "1"]
    assert main([*PAPER, *model, "--json", "--picture", str(picture)]) == 0
    raw = json.loads(capsys.readouterr().out)
    dense, half, *_ = raw["forecast"]
    # One bucket of 4,096 and one of 16.8M, which nothing hides: 2 * 7 / 8 of 67.1 MB at 125 MB/s.
    assert dense["seconds"] == pytest.approx(0.1 + 2 * 7 / 8 * 4 * 4096 * 4097 / 125e6, rel=1e-3)
    assert half["waiting"] == pytest.approx(dense["waiting"] / 2, rel=1e-3)
    assert [f["name"] for f in raw["forecast"] if f["recommended"]] == ["dgc 0.1 %"]
    assert "warmup_steps=2000" in raw["lines"]
    assert picture.stat().st_size > 10_000

    assert main([*PAPER, *model, "--link", "10mbit", "--steps", "36000", "--price", "2", "--ranks-per-node", "4"]) == 0
    text = capsys.readouterr().out
    row = next(line.split() for line in text.splitlines() if line.startswith("dense, float32"))
    assert float(row[-1].replace(",", "")) == pytest.approx(8 * 2 * float(row[-2].replace(",", "")), rel=0.01)
    assert 'mesh="auto"' in text
    assert 'exchange="auto"' not in text  # which nodes as workers refuse
    assert "dgc 0.1 %, nodes" in text


def test_under_horovodrun_the_lines_are_horovods(capsys, monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "8")
    assert main([*PAPER, "--model", "4096x4096", "--step-ms", "100", "--optimizer", "adamw"]) == 0
    text = capsys.readouterr().out
    assert "optimizer = dgc.AdamW(model.parameters(), ...)" in text
    assert "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters(), compressor)" in text
    assert "DistributedDataParallel" not in text
    assert "dense, fp16" in text
    assert "bf16" not in text


def test_a_fast_link_gets_the_16_bit_hook(capsys):
    assert main(["plan", "--link", "100gbit", "--ranks", "4", "--model", "resnet50", "--step-ms", "213"]) == 0
    text = capsys.readouterr().out
    assert "model.register_comm_hook(None, bf16_compress_hook)" in text
    assert text.rstrip().splitlines()[-1].startswith("Where the link may be slower at times, dgc.DGCConfig(exchange=")


def test_what_no_forecast_can_tell_is_left_to_the_run(capsys):
    close = ["plan", "--link", "50gbit", "--ranks", "64", "--model", "bert-large", "--step-ms", "373"]
    assert main([*close, "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    seconds = {f["name"]: f["seconds"] for f in raw["forecast"]}
    [chosen] = [f["name"] for f in raw["forecast"] if f["recommended"]]
    assert chosen == "dgc 1 %"
    assert 1 / 1.05 < seconds["dense, bf16"] / seconds[chosen] < 1.05
    config = 'dgc.DGCConfig(density=0.01, exchange="auto", dense_wire_dtype="bfloat16"))'
    assert raw["lines"].endswith(config)
    assert raw["advice"].startswith('exchange="auto" times dense and compressed steps')
    assert main(close) == 0
    text = capsys.readouterr().out
    assert "dgc 1 % and dense, bf16 are within 5 % of each other, closer than a forecast can tell. Let the" in text
    assert config in text
    assert text.endswith(f"\n{raw['advice']}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (PAPER, "--model: expected a function (train.py:make_model"),
        (["plan", "--model", "ResNet-50"], "expected a process group or --link, got neither"),
        (["plan", "--model", "ResNet-50", "--link", "1gbit"], "expected --ranks too"),
        ([*PAPER, "--model", "ResNet-50"], "give --step-ms, or --backward-ms"),
        ([*PAPER, "--model", "ResNet-51", "--step-ms", "9"], "one of ResNet-50"),
        ([*PAPER, "--model", "12x0,3", "--step-ms", "9"], "expected shapes such as 1024x1024 or 1024, got '12x0'"),
        ([*PAPER, "--model", "nowhere.py:make", "--step-ms", "9"], "got FileNotFoundError from nowhere.py:make"),
        ([*PAPER, "--model", "json:dumps", "--step-ms", "9"], "got TypeError from json:dumps"),
        ([*PAPER, "--model", "os:getpid", "--step-ms", "9"], "to return a torch.nn.Module, or (module, loss)"),
        ([*PAPER, "--model", "9x9", "--step-ms", "9", "--backward-ms", "10"], "expected at most the step's 9, got 10"),
        ([*PAPER, "--model", "9x9", "--step-ms", "-9"], "--step-ms: expected a number above 0, got -9"),
        ([*PAPER, "--model", "9x9", "--step-ms", "9", "--price", "2"], "expected --steps too"),
        ([*PAPER, "--model", "9x9", "--step-ms", "9", "--ranks-per-node", "3"], "expected a divisor of --ranks 8"),
        ([*PAPER, "--model", "9x9", "--step-ms", "9", "--picture", "no/p.png"], "expected a folder that exists"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.startswith("python -m dgc plan: ")
    assert text.count("\n") == 1


def test_what_is_missing_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(dgc.cli.report.importlib.util, "find_spec", lambda _: None)
    arguments = [*PAPER, "--model", "9x9", "--step-ms", "9"]
    assert main([*arguments, "--picture", str(tmp_path / "p.png")]) == 2
    assert "pip install 'torch-dgc[cli]'" in capsys.readouterr().err
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "dense, float32 | " in said.out
    assert "tabulate is not installed: pip install 'torch-dgc[cli]'" in said.err


def test_shapes_are_read(tmp_path):
    assert parse_shapes("3x4,5 head:6x7x8", "here") == {"0": (3, 4), "1": (5,), "head": (6, 7, 8)}
    assert parse_shapes('{"a": [3, 4], "b": [5]}', "here") == {"a": (3, 4), "b": (5,)}
    assert parse_shapes("[[3, 4], [5]]", "here") == {"0": (3, 4), "1": (5,)}
    path = tmp_path / "shapes.txt"
    path.write_text("# a layer\n3x4  # its weight\n4\n")
    assert load(str(path)).shapes == {"0": (3, 4), "1": (4,)}
    assert load("bert_large").shapes == NETWORKS["BERT-large"]()
    for text in ("", "# nothing", "3x", "[[3, 4]", "[3]", "3x-4"):
        with pytest.raises(UsageError, match="expected shapes"):
            parse_shapes(text, "here")


MODELS = """
import os
import torch
from torch import nn


def trained():
    torch.manual_seed(0)
    x = torch.randn(8, 256)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), lambda model: model(x).square().mean()


def breaks():
    return nn.Linear(4, 4), lambda model: model(torch.zeros(1, 5)).sum()


def differs():
    return nn.Linear(4 + int(os.environ["SLURM_PROCID"]), 4)


def fails():
    if os.environ["SLURM_PROCID"] == "1":
        raise ValueError("no data on this rank")
    return nn.Linear(4, 4)
"""
CALLS = """
import json, os, sys
from dgc.cli.main import main
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    print(json.dumps({"status": main(arguments)}), flush=True)
    print("== next", flush=True)
    print("== next", file=sys.stderr, flush=True)
"""


def on_two_ranks(tmp_path, calls):
    """Returns what two ranks, started as srun starts them, print and complain of in each call, and the status."""
    with ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in calls]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    processes = []
    for rank in range(2):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        slurm |= {"SLURM_STEP_NODELIST": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CALLS, json.dumps(list(zip(ports, calls, strict=True)))]
        environment = {**os.environ, **slurm, "PYTHONPATH": f"{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = []
    for out, err in said:
        parts = zip(out.split("== next\n"), err.split("== next\n"), strict=False)
        results.append([(text, error) for text, error in parts][: len(calls)])
        assert len(results[-1]) == len(calls), err
    return [
        [(json.loads(text.splitlines()[-1])["status"], "\n".join(text.splitlines()[:-1]), error) for text, error in one]
        for one in results
    ]


def test_two_ranks_measure_and_agree(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    plan = ["plan", "--seconds", "1"]
    calls = [
        [*plan, "--json", "--model", "models.py:trained", "--ranks-per-node", "1"],
        [*plan, "--json", "--model", "1000x200,200", "--backward-ms", "40", "--optimizer", "adamw"],
        [*plan, "--model", "models:differs", "--step-ms", "9"],
        [*plan, "--model", "models.py:fails", "--step-ms", "9"],
        [*plan, "--model", "100000x100000x100", "--step-ms", "9"],
        [*plan, "--model", "9x9"],
        [*plan, "--model", "models.py:breaks"],
        ["doctor", "--json"],
    ]
    first, second = on_two_ranks(tmp_path, calls)
    assert [status for status, *_ in first] == [status for status, *_ in second] == [0, 0, 2, 2, 2, 2, 2, 0]
    assert all(not text for _, text, _ in second)  # rank 0 speaks for all

    _, text, err = first[0]
    assert err.count("plan: link: all-") == 3  # progress
    assert "plan: all ranks are on one machine" in err
    raw = json.loads(text)
    by_name = {f["name"]: f for f in raw["forecast"]}
    assert [*by_name] == ["dense, float32", "dense, fp16", "dgc 1 %", "dgc 0.1 %"]
    # Two weights of 65,536 and biases of 256. Two ranks send all of it, or a payload of 1 or 0.1 %, and the biases.
    assert by_name["dense, float32"]["bytes"] == 2 * by_name["dense, fp16"]["bytes"] == 4 * 2 * (65_536 + 256)
    # 656 entries of each weight: values, 6 low bits and 1 + 65,536 / 64 / 656 upper bits an index; and headers.
    entries = 2 * (4 * 656 + 656 * 6 // 8 + (656 + 1024) // 8)
    assert by_name["dgc 1 %"]["bytes"] - 2 * 4 * 256 - entries in range(48, 144)
    assert all(f["seconds"] > f["waiting"] > 0 for f in by_name.values())
    assert len(raw["links"]) == 3

    by_name = {f["name"]: f for f in json.loads(first[1][1])["forecast"]}
    assert all(f["seconds"] >= 0.06 + f["waiting"] - 1e-9 for f in by_name.values())  # 1.5 times the backward pass

    said = [error.strip().splitlines()[-1] for _, _, error in first[2:7]]
    assert "got 2 parameters of 20 elements" in said[0]
    assert "on rank 0 and 2 parameters of 24 elements" in said[0]
    assert "plan: rank 1: --model: expected a function" in said[1]
    assert "got ValueError from models.py:fails: no data on this rank" in said[1]
    assert "expected one that fits into memory" in said[2]
    assert "give --step-ms, or --backward-ms" in said[3]
    assert "expected a model that takes a training step under DDP, got RuntimeError: mat1 and mat2" in said[4]

    found = {f["name"]: f for f in json.loads(first[7][1])}
    assert found["ranks agree"]["value"] == "yes, 2 of them"
    assert found["replicas are identical"]["value"] == "yes, bit by bit"
    assert found["checkpoint goes on alike"]["value"] == "yes"
