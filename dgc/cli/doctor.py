"""doctor: what a bug report needs, versions, kernels, network and a self-test, and the way out of what is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import dgc
from dgc.exchange.distributed import everyone_of

from . import selftest
from .ranks import join, machine_name, started

PACKAGES = ("numpy", "horovod", "lightning", "accelerate", "transformers", "cupy-cuda13x")
OLDEST = (2, 10)
"""torch that the package needs."""
VIRTUAL = ("lo", "docker", "veth", "br-", "virbr")
"""Beginnings of names of interfaces that lead to no other machine."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    value: str
    problem: str = ""
    """What is wrong, and what to do; empty where all is well."""


def versions() -> list[Finding]:
    """Returns what is installed."""
    found = [
        Finding("dgc", f"{dgc.__version__}, in {Path(dgc.__file__).parent}"),
        Finding("python", f"{platform.python_version()}, {platform.platform()}"),
    ]
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    old = f"expected torch {OLDEST[0]}.{OLDEST[1]} or later: pip install --upgrade torch" if numbers < OLDEST else ""
    found.append(Finding("torch", torch.__version__, old))
    there = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    used = [f"{package} {there[package]}" for package in PACKAGES if package in there]
    return [*found, Finding("packages", ", ".join(used) or f"none of {', '.join(PACKAGES)}")]


def compilers() -> list[Finding]:
    """Returns the compilers that setup.py would take."""
    found = []
    for name, command in (("C++ compiler", os.environ.get("CXX", "g++")), ("nvcc", "nvcc")):
        path = shutil.which(command)
        if path is None:
            found.append(Finding(name, "none"))
            continue
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)
        numbered = [line for line in shown.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
        found.append(Finding(name, numbered[0].strip() if numbered else path))
    return found


def kernels() -> list[Finding]:
    """Returns what runs the ops on each device."""
    install = "install g++, then: pip install --force-reinstall --no-deps ."
    cpu = dgc.backend("cpu")
    slow = f"the kernels were not built, and plain PyTorch is many times slower: {install}" if cpu != "native" else ""
    found = [Finding("kernels, CPU", cpu, slow)]
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return [*found, Finding("GPUs", f"none that torch sees, which is {built}")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        memory = torch.cuda.get_device_properties(i).total_memory
        text = f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, {memory / 2**30:.0f} GiB"
        found.append(Finding(f"GPU {i}", text))
    gpu = dgc.backend("cuda")
    slow = "no CUDA kernels, and plain PyTorch is slower: with nvcc, pip install .; without, pip install '.[cupy]'"
    nccl = torch.cuda.nccl.version() if dist.is_nccl_available() else None
    without = "torch was built without NCCL, which DDP on GPUs wants: install torch from its own index"
    return [
        *found,
        Finding("kernels, GPU", gpu, slow if gpu == "reference" else ""),
        Finding("NCCL", ".".join(map(str, nccl)) if nccl else "none", "" if nccl else without),
    ]


def addresses() -> dict[str, str]:
    """Returns the IPv4 address of each network interface that has one."""
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue  # it has none
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def network(
    interfaces: Mapping[str, str], host: str | None, environment: Mapping[str, str], several: bool
) -> list[Finding]:
    """Returns the interfaces, and those that gloo and NCCL take.

    Args:
        interfaces: addresses by name.
        host: the address that this host's name leads to; None where it leads nowhere.
        environment: of this process.
        several: whether ranks are on several machines.
    """
    outside = [name for name in interfaces if not name.startswith(VIRTUAL)]
    found = [Finding("interfaces", ", ".join(f"{name} {ip}" for name, ip in interfaces.items()) or "none")]
    example = outside[0] if outside else "eth0"
    asked = environment.get("GLOO_SOCKET_IFNAME")
    problem = ""
    if asked is not None:
        named = [name for name in asked.split(",") if name not in interfaces]
        taken = f"{asked}, by GLOO_SOCKET_IFNAME"
        if named:
            problem = f"no interface {', '.join(named)} with an address: set GLOO_SOCKET_IFNAME={example}, or unset it"
    else:
        of_host = next((name for name, ip in interfaces.items() if ip == host), None)
        if host is not None and host.startswith("127."):
            of_host = "lo"
        taken = f"{of_host or 'unknown'}, the one of this host's name ({host or 'which leads nowhere'})"
        if several and (of_host is None or of_host.startswith(VIRTUAL)):
            problem = f"other machines cannot reach it: export GLOO_SOCKET_IFNAME={example} on all of them"
    found.append(Finding("gloo takes", taken, problem))
    asked, problem = environment.get("NCCL_SOCKET_IFNAME"), ""
    if asked is not None and not _nccl_matches(asked, interfaces):
        problem = f"no interface of that name: set NCCL_SOCKET_IFNAME={example}, or unset it"
    taken = (
        f"{asked}, by NCCL_SOCKET_IFNAME" if asked is not None else outside[0] if outside else "none but virtual ones"
    )
    return [*found, Finding("NCCL takes", taken, problem)]


def _nccl_matches(asked: str, interfaces: Mapping[str, str]) -> bool:
    """Returns whether an interface is left by NCCL's notation: beginnings, ^ in front to exclude, = for whole names."""
    excluded, names = asked.startswith("^"), asked.lstrip("^=").split(",")
    whole = asked.lstrip("^").startswith("=")
    hit = [any(i == n if whole else i.startswith(n) for n in names) for i in interfaces]
    return any(not h for h in hit) if excluded else any(hit)


def agreement(descriptions: Sequence[Mapping[str, str]]) -> Finding:
    """Returns whether ranks have the same versions and kernels, which their descriptions by name say."""
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        for name in first:
            if other.get(name) != first[name]:
                problem = (
                    f"{name} is {first[name]} on rank 0 and {other.get(name)} on rank {rank}: install the same on all "
                    "machines"
                )
                return Finding("ranks agree", "no", problem)
    return Finding("ranks agree", f"yes, {len(descriptions)} of them")


def judged(outcome: selftest.Outcome) -> list[Finding]:
    """Returns what the self-test says."""
    report = "please report it, with the output of python -m dgc doctor --json"
    where = f"{outcome.ranks} ranks on {outcome.device}, {outcome.seconds:.1f} s"
    share = outcome.bytes_sent / outcome.bytes_dense
    restored = {True: "yes", False: "no", None: "not tried: the ranks share no folder"}[outcome.restored]
    return [
        Finding("self-test", where, "" if outcome.falling else f"the loss does not fall: {report}"),
        Finding(
            "replicas are identical",
            "yes, bit by bit" if outcome.replicas else "no",
            "" if outcome.replicas else f"ranks have different weights: {report}",
        ),
        Finding(
            "bytes sent",
            f"{outcome.bytes_sent:,} a step of {outcome.bytes_dense:,} dense, {100 * share:.1f} %",
            "" if share < 0.5 else f"nothing was compressed: {report}",
        ),
        Finding(
            "checkpoint goes on alike",
            restored,
            f"a step after loading differs: {report}" if outcome.restored is False else "",
        ),
    ]


def run(args: argparse.Namespace) -> int:
    """Examines, prints, and returns 1 where something is wrong, else 0."""
    process = started(os.environ)
    if process is not None and process.ranks == 1:
        process = None
    device = None if process is None else join(process)
    machines = [machine_name()] if process is None else everyone_of(None, machine_name())
    several = len(set(machines)) > 1
    try:
        host: str | None = socket.gethostbyname(socket.gethostname())
    except OSError:
        host = None
    found = [*versions(), *compilers(), *kernels(), *network(addresses(), host, os.environ, several)]
    if process is not None:
        same = {f.name: f.value for f in found if f.name in ("torch", "kernels, CPU", "kernels, GPU")}
        same |= {"dgc": dgc.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
        found.append(agreement([json.loads(text) for text in everyone_of(None, json.dumps(same))]))
    if not args.no_self_test:
        found += _tested(device, several)
    wrong = [f for f in found if f.problem]
    if process is not None:
        # What is wrong on any rank is wrong, and every rank ends alike.
        others = [json.loads(text) for text in everyone_of(None, json.dumps([asdict(f) for f in wrong]))]
        known = {f.name for f in found}
        for rank, theirs in enumerate(others[1:], 1):
            new = [Finding(f"{f['name']}, rank {rank}", f["value"], f["problem"]) for f in theirs]
            found += [f for f in new if f.name not in known and (f.value, f.problem) not in _said(wrong)]
        wrong = [f for f in found if f.problem]
    if process is None or process.rank == 0:
        _show(found, args.json)
    if process is not None:
        dist.barrier()
    return 1 if wrong else 0


def _said(findings: Sequence[Finding]) -> set[tuple[str, str]]:
    return {(f.value, f.problem) for f in findings}


def _tested(device: torch.device | None, several: bool) -> list[Finding]:
    if device is None or dist.get_rank() == 0:
        print("doctor: self-test of some seconds", file=sys.stderr, flush=True)
    try:
        if device is None:
            return judged(selftest.alone())
        if several:
            return judged(selftest.train(device, None))
        folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(folder)
        outcome = selftest.train(device, Path(folder[0]))
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
        return judged(outcome)
    except (RuntimeError, ValueError, OSError) as error:
        last = str(error).strip().splitlines()[-1]
        problem = (
            f"it failed: {last}. Look at the network's lines above; if they are right, report it with the whole text"
        )
        print(error, file=sys.stderr)
        return [Finding("self-test", "failed", problem)]


def _show(found: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(f) for f in found], indent=1))
        return
    width = max(len(f.name) for f in found)
    for f in found:
        print(f"{'WRONG' if f.problem else 'ok   '}  {f.name:<{width}}  {f.value}")
        if f.problem:
            print(f"       {'':<{width}}  -> {f.problem}")
    wrong = sum(bool(f.problem) for f in found)
    print(f"\n{wrong} wrong of {len(found)}" if wrong else "\nAll is well.")
