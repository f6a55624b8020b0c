"""A network with real limits on one Linux machine: every rank, or every node of ranks, has a namespace and a cable.

The script becomes the switch: `switch()` moves it into a new network namespace that holds a bridge. Each process that
it starts then plugs itself in with `Link()`: it moves into a namespace of its own, and a veth pair joins `eth0` there
to a port of the bridge. Nothing of the host's network is touched. Namespaces have no names here, they live as long as
a process is in them, and the kernel kills a rank whose parent is gone; so that even kill -9 leaves nothing behind.

A rate holds for what a rank sends (the qdisc of its eth0) and for what it receives (the qdisc of its port on the
bridge), as for a network card at full duplex behind a switch that is never the bottleneck. With `node_link()` a node's
ranks share a namespace and its cable, and reach each other over its loopback, without a limit. In gloo's rings, where
each rank sends to one neighbour and receives from the other, the first limit is the one that binds; the second one does
where several send to the same rank. Both are token buckets (tbf), which fill up while the ranks compute, so that a
bucket's worth of every step passes at no cost: 4 KiB below 1 Gbit/s. From there on it is 0.6 ms of the rate, since
Linux hands over 64 KiB at once, and tbf would cut what does not fit into single frames, which takes so long that less
than half of 1 Gbit/s is left.

Latency is that of the kernel, some 0.05 ms, unless there is netem (CONFIG_NET_SCH_NETEM), which adds to it.
TCP is at Linux's default congestion control, cubic, whatever the machine prefers.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
BRIDGE = "bridge"
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
BATCH = 70_000  # bytes that Linux hands over at once, with headers


def bits(rate: str) -> int:
    """Returns bits a second of a rate as tc writes it: `100mbit`.

    Raises:
        ValueError: it is not a whole number of kbit, mbit or gbit.
    """
    number, unit = rate[:-4], rate[-4:]
    if unit not in UNITS or not number.isdigit() or int(number) == 0:
        raise ValueError(f"rate: expected a number of {', '.join(UNITS)}, such as 100mbit, got {rate!r}")
    return int(number) * UNITS[unit]


def missing() -> str:
    """Returns why there can be no limits here; empty where there can."""
    return _refused("tbf", "rate", "1gbit", "burst", "125000", "latency", "50ms")


def has_netem() -> bool:
    """Returns whether latency can be added."""
    return not _refused("netem", "delay", "1ms")


def _refused(*qdisc: str) -> str:
    # In a namespace of the probe's own, which is gone when it ends.
    make = ["ip", "link", "add", "name", "probe", "type", "veth", "peer", "name", "peer"]
    script = f"{' '.join(make)} && ip link add name br type bridge && tc qdisc add dev probe root {' '.join(qdisc)}"
    try:
        probe = subprocess.run(
            ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError as error:
        return str(error)
    return "" if probe.returncode == 0 else probe.stderr.strip() or "unshare, ip or tc failed"


def _burst(bits_a_second: int) -> int:
    """Returns the bytes of a token bucket."""
    share = bits_a_second * 6 // 80_000  # 0.6 ms
    return share if share >= BATCH else 4096


@contextmanager
def switch() -> Iterator[None]:
    """Makes this process the switch; call it in the main thread, whose namespace is the one that ranks find.

    Raises:
        OSError: not allowed: it needs root.
    """
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _call("unshare", CLONE_NEWNET)
        try:
            _run("ip", "link", "add", "name", BRIDGE, "type", "bridge")
            _run("ip", "link", "set", "dev", BRIDGE, "up")
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)


class Link:
    """The cable of this process. Made in a child of the switch, before anything opens a socket."""

    def __init__(self, rank: int) -> None:
        """Plugs in, without limit, at the address 10.0.0.(rank + 1), and tells gloo to use it."""
        parent = die_with_parent()
        self._port = f"port{rank}"
        self._at_switch = ("nsenter", f"--net=/proc/{parent}/ns/net")
        self._ends: tuple[tuple[tuple[str, ...], str], ...] = (((), INTERFACE), (self._at_switch, self._port))
        _call("unshare", CLONE_NEWNET)
        self._prepare()
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", str(os.getpid()))
        _run(*self._at_switch, "ip", "link", "add", "name", self._port, *peer)
        _run(*self._at_switch, "ip", "link", "set", "dev", self._port, "master", BRIDGE, "up")
        _run("ip", "address", "add", f"10.0.0.{rank + 1}/24", "dev", INTERFACE)
        _run("ip", "link", "set", "dev", INTERFACE, "up")
        # Only the route may choose cubic where the machine's default is another: the sysctl is for the host alone.
        route = ("10.0.0.0/24", "dev", INTERFACE, "src", f"10.0.0.{rank + 1}", "proto", "kernel", "scope", "link")
        _run("ip", "route", "replace", *route, "congctl", "cubic")
        _run("ip", "link", "set", "dev", "lo", "up")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def limit(self, rate: str, latency_ms: float = 0.0) -> None:
        """Sets the rate of both directions, and how long each frame travels besides, where there is netem."""
        burst = _burst(bits(rate))
        for where, interface in self._ends:
            tbf = ("tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
            _run(*where, "tc", "qdisc", "replace", "dev", interface, "root", "handle", "1:", *tbf)
        if latency_ms:
            delay = ("netem", "delay", f"{latency_ms}ms", "limit", "100000")
            _run("tc", "qdisc", "replace", "dev", INTERFACE, "parent", "1:", "handle", "10:", *delay)

    def rates(self) -> list[int]:
        """Returns the rates that tc says are set, in bits a second: of what this rank sends, and of what it gets."""
        return [8 * self._qdisc(where, name)["options"]["rate"] for where, name in self._ends]

    def sent(self) -> int:
        """Returns the bytes this rank has sent since a limit was first set.

        They are those of Ethernet frames, each with its headers, as tbf counts them. The interface's own counter is
        not what it seems: it takes a batch of up to 64 KiB, which is cut up only later, for one frame with one header.
        """
        return int(self._qdisc((), INTERFACE)["bytes"])

    def _qdisc(self, where: tuple[str, ...], interface: str) -> dict[str, Any]:
        printed = _run(*where, "tc", "-statistics", "-json", "qdisc", "show", "dev", interface)
        return next(qdisc for qdisc in json.loads(printed) if qdisc["kind"] == "tbf")

    def _prepare(self) -> None:
        version_6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
        if version_6.exists():  # its announcements would be counted
            version_6.write_text("1")


def node_link(node: int, place: int, folder: str) -> Link | None:
    """Plugs a node in as its first rank, whose cable it returns; moves another rank to the first one's namespace.

    Called, in place of Link(), in children of the switch, before anything opens a socket.

    Args:
        node: the number of the node.
        place: of this rank in the node.
        folder: one that all ranks of the node share, and that is empty at first.

    Returns:
        The node's cable; None on all its ranks but the first.
    """
    told = Path(folder, f"namespace{node}")
    if place == 0:
        link = Link(node)
        draft = told.with_suffix(".draft")
        draft.write_text(str(os.getpid()))
        draft.rename(told)  # nobody reads half a number
        return link
    die_with_parent()
    while not told.exists():
        time.sleep(0.01)
    theirs = os.open(f"/proc/{told.read_text()}/ns/net", os.O_RDONLY)
    try:
        _call("setns", theirs, CLONE_NEWNET)
    finally:
        os.close(theirs)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    return None


def die_with_parent() -> int:
    """Makes the kernel kill this process when its parent ends, and returns the parent's id."""
    parent = os.getppid()
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked to take us along
        os.kill(os.getpid(), signal.SIGKILL)
    return parent


def _run(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise OSError(f"{' '.join(command)}: {run.stderr.strip()}")
    return run.stdout


def _call(name: str, *arguments: int) -> None:
    """Calls a function of libc that Python has not (os.unshare is 3.12's)."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}; network namespaces need root")
