"""`python -m dgc doctor`: what it finds wrong, and a run in which all is well."""

import json
import subprocess
import sys

import pytest

from benchmarks.harness import ROOT
from dgc.cli import doctor, selftest
from dgc.cli.doctor import agreement, judged, network
from dgc.cli.main import main
from dgc.cli.selftest import Outcome

INTERFACES = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}


def of(findings, name):
    return next(f for f in findings if f.name == name)


def test_gloo_takes_the_interface_of_the_hosts_name():
    found = network(INTERFACES, "10.1.0.7", {}, several=True)
    assert of(found, "gloo takes").value.startswith("ib0,")
    assert of(found, "NCCL takes").value == "eth0"
    assert not any(f.problem for f in found)


@pytest.mark.parametrize("host", ["127.0.1.1", "172.17.0.1", None])
def test_an_interface_that_leads_nowhere_is_wrong_for_several_machines(host):
    assert "export GLOO_SOCKET_IFNAME=eth0" in of(network(INTERFACES, host, {}, True), "gloo takes").problem
    assert not of(network(INTERFACES, host, {}, False), "gloo takes").problem


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [("eth", False), ("=eth", True), ("^eth,ib", False), ("wlan", True), ("^lo,docker,eth,ib", True)],
)
def test_interfaces_that_are_asked_for(asked, wrong):
    found = network(INTERFACES, "10.0.0.7", {"NCCL_SOCKET_IFNAME": asked}, several=True)
    assert bool(of(found, "NCCL takes").problem) == wrong
    found = network(INTERFACES, "10.0.0.7", {"GLOO_SOCKET_IFNAME": asked}, several=True)
    assert "set GLOO_SOCKET_IFNAME=eth0, or unset it" in of(found, "gloo takes").problem


def test_ranks_that_differ_are_named():
    same = {"torch": "2.13.0", "dgc": "0.1.0"}
    assert agreement([same, same]).value == "yes, 2 of them"
    found = agreement([same, same, {**same, "torch": "2.12.0"}])
    assert found.problem.startswith("torch is 2.13.0 on rank 0 and 2.12.0 on rank 2: install the same")


def test_what_the_self_test_may_find():
    well = Outcome(2, "cpu", True, True, bytes_sent=10, bytes_dense=1000, restored=True, seconds=1.0)
    assert [f.problem for f in judged(well)] == [""] * 4
    for wrong, name in (
        (well._replace(falling=False), "self-test"),
        (well._replace(replicas=False), "replicas are identical"),
        (well._replace(bytes_sent=900), "bytes sent"),
        (well._replace(restored=False), "checkpoint goes on alike"),
    ):
        assert [f.name for f in judged(wrong) if f.problem] == [name]
    assert not of(judged(well._replace(restored=None)), "checkpoint goes on alike").problem


def test_it_goes_well_here():
    command = [sys.executable, "-m", "dgc", "doctor", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = {f["name"]: f for f in json.loads(result.stdout)}
    wrong = {name for name, f in found.items() if f["problem"]}
    assert result.returncode == (1 if wrong else 0)
    assert wrong <= {"kernels, CPU"}  # where there is no compiler
    assert found["self-test"]["value"].startswith("2 ranks on ")
    assert found["replicas are identical"]["value"] == "yes, bit by bit"
    assert found["checkpoint goes on alike"]["value"] == "yes"


def test_what_is_wrong_is_shown_with_the_way_out(capsys, monkeypatch):
    def fails():
        raise RuntimeError("rank 1 died\nconnection refused")

    monkeypatch.setattr(selftest, "alone", fails)
    monkeypatch.setattr(doctor.dgc, "backend", lambda device: "reference")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "WRONG  self-test" in text
    assert "it failed: connection refused" in text
    assert "install g++" in text
    assert main(["doctor", "--no-self-test"]) == 1
    assert "self-test" not in capsys.readouterr().out
