"""The network of benchmarks/training/network.py: links are limited, counters are right, nothing is left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.harness import ROOT
from benchmarks.training import network
from benchmarks.training.links import namespaces
from benchmarks.training.links.meter import sent

NETWORK = [sys.executable, "-m", "benchmarks.training.network"]

REASON = "unshare, ip or tc is missing" if not all(map(shutil.which, ("unshare", "ip", "tc"))) else namespaces.missing()
limited = pytest.mark.skipif(bool(REASON), reason=f"NOT CHECKED: network limits, which need root: {REASON}")


def test_rates_are_read_as_tc_reads_them():
    assert [namespaces.bits(rate) for rate in ("100mbit", "1gbit", "64kbit")] == [10**8, 10**9, 64_000]
    for rate in ("100", "1.5gbit", "100mbps", "-1mbit", "0mbit", "gbit", ""):
        with pytest.raises(ValueError, match="rate: expected a number of kbit, mbit, gbit"):
            namespaces.bits(rate)


def send_around(rank, folder, elements):
    link = namespaces.Link(rank)
    link.limit("100mbit")
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    before = link.sent()
    dist.barrier()
    dist.all_reduce(torch.ones(elements))
    dist.barrier()
    sent = link.sent() - before
    devices = Path("/proc/net/dev").read_text()
    seen = sorted(line.split(":")[0].strip() for line in devices.splitlines()[2:])
    qdiscs = [namespaces._run(*where, "tc", "-s", "qdisc", "show", "dev", name) for where, name in link._ends]
    torch.save({"sent": sent, "rates": link.rates(), "qdiscs": qdiscs, "seen": seen}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@limited
def test_a_link_is_limited_in_both_directions_and_counts_what_is_sent(tmp_path):
    home, elements = Path("/proc/self/ns/net").readlink(), 500_000
    with namespaces.switch():
        mp.spawn(send_around, (str(tmp_path), elements), nprocs=2)
    assert Path("/proc/self/ns/net").readlink() == home
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["rates"] == [10**8] * 2
        assert all("qdisc tbf 1: root" in q and "rate 100Mbit burst 4Kb" in q for q in result["qdiscs"])
        # What came in a burst had to wait for the bucket to fill up again.
        assert int(re.search(r"overlimits (\d+)", result["qdiscs"][0])[1]) > 0
        # 66 bytes of headers on 1,448 of data are 4.6 %, and there are acknowledgements and retransmissions.
        payload = 2 * (2 - 1) * elements * 4 / 2
        assert payload < result["sent"] < 1.15 * payload
        assert {"lo", "eth0"} <= set(result["seen"])
        assert not any(name.startswith("port") or name == namespaces.BRIDGE for name in result["seen"])


def processes() -> dict[int, tuple[int, str]]:
    """Returns parent and network namespace of every process."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(place.name)] = (parent, str((place / "ns/net").readlink()))
    return found


def family(found: dict[int, tuple[int, str]], ancestor: int) -> set[int]:
    """Returns a process and all that come of it."""
    members = {ancestor}
    while more := {pid for pid, (parent, _) in found.items() if parent in members} - members:
        members |= more
    return members


def exchanges(pid: int) -> bool:
    """Returns whether a process has a TCP connection in its network namespace."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[3] == "01" for line in lines)  # established
    return False


def until(condition: Callable[[], object], seconds: int) -> bool:
    for _ in range(seconds * 20):
        if condition():
            return True
        time.sleep(0.05)
    return False


@limited
def test_kill_9_leaves_no_process_and_no_namespace():
    command = [*NETWORK, "--models", "tiny", "--ranks", "2", "--rates", "1gbit", "--seconds", "600"]
    # Not through pipes: what is left behind would hold them open.
    script = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    host = str(Path("/proc/self/ns/net").readlink())

    def ranks() -> list[int]:
        found = processes()
        inside = [pid for pid in family(found, script.pid) - {script.pid} if pid in found and found[pid][1] != host]
        return [pid for pid in inside if exchanges(pid)]

    try:
        assert until(lambda: len(ranks()) == 2, 60), "no two ranks that exchange"
        found = processes()
        members = family(found, script.pid)
        namespaces_held = {found[pid][1] for pid in members} - {host}
        assert len(namespaces_held) == 3  # the switch's and the ranks'
        for rank in ranks():
            os.kill(rank, signal.SIGSTOP)  # as one that hangs: of all signals only SIGKILL ends it
    finally:
        script.kill()
        script.wait()
    gone = until(lambda: not members & set(processes()), 20)
    for left in members & set(processes()):
        os.kill(left, signal.SIGKILL)
    assert gone
    assert not namespaces_held & {namespace for _, namespace in processes().values()}
    mounts = Path("/proc/self/mountinfo").read_text()
    assert not any(namespace in mounts for namespace in namespaces_held)


def test_a_short_run_measures_all_competitors():
    result = subprocess.run([*NETWORK, "--smoke"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    header = next(line for line in result.stdout.splitlines() if line.startswith("| model"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[2:] == ["no_sync, ms", "ddp", "ddp fp16", "powersgd", "topk", "dgc"]
    if REASON:
        assert "NO LIMIT: loopback" in result.stdout
        assert "NO LIMITS" in result.stderr
    else:
        assert "2 ranks, real limits, no latency set" in result.stdout
        assert "dgc's stats" in result.stdout


def test_a_layout_is_nodes_by_ranks():
    assert [network.layout_of(text) for text in ("2x2", "2x4", "3x1")] == [(4, 2), (8, 4), (3, 1)]
    for text in ("", "2", "2x", "1x4", "2x0", "-2x2", "2x2x2"):
        with pytest.raises(ValueError, match="expected two nodes or more by ranks of a node"):
            network.layout_of(text)


def share_a_link(rank, folder, elements):
    link = namespaces.node_link(*divmod(rank, 2), folder)
    if link:
        link.limit("1gbit")
    dist.init_process_group("gloo", rank=rank, world_size=4, store=dist.FileStore(f"{folder}/store", 4))
    node = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = {"link": link is not None, "namespace": str(Path("/proc/self/ns/net").readlink())}
    for what, group in (("inside", node), ("all", None)):
        dist.all_reduce(torch.ones(1), group=group)
        dist.barrier()
        before = sent(link)
        dist.barrier()
        dist.all_reduce(torch.ones(elements), group=group)
        dist.barrier()
        found[what] = sent(link) - before
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@limited
def test_ranks_of_a_node_share_a_link_that_what_they_tell_each_other_does_not_cross(tmp_path):
    elements = 500_000
    with namespaces.switch():
        mp.spawn(share_a_link, (str(tmp_path), elements), nprocs=4)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    assert [rank["link"] for rank in ranks] == [True, False, True, False]
    names = [rank["namespace"] for rank in ranks]
    assert names[0] == names[1] != names[2] == names[3]
    for first in ranks[::2]:
        assert first["inside"] < 20_000  # barriers
        payload = 2 * (4 - 1) * elements * 4 / 4  # of a ring, of which one rank sends to the other node
        assert payload < first["all"] < 1.15 * payload


def test_a_short_run_in_nodes_measures_all_competitors():
    command = [*NETWORK, "--nodes", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    header = next(line for line in result.stdout.splitlines() if line.startswith("| nodes"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[3:] == ["no_sync, ms", "ddp", "ddp bf16", "dgc", "dgc nodes", "hsdp", "dgc fsdp2"]
    if REASON:
        assert "NO LIMIT: loopback" in result.stdout
        assert "NO LIMITS" in result.stderr
    else:
        assert "real limits on a node's link, no latency set" in result.stdout
        assert "dgc nodes, counted / stats" in result.stdout
