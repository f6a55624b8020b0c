"""Horovod processes that call functions for the tests: forked as ranks are, where horovodrun would start them."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from support.ranks import fork_server

process_set: Any = None
"""In a process of a Pool: its first process set besides the global one."""


class Pool:
    """The processes of one Horovod group, which wait for functions to call.

    They outlive each other: horovodrun would kill the others when one dies.

    Args:
        num_proc: their number.
        process_sets: ranks of each process set besides the global one; or "dynamic", to add them later.
        timeout: seconds for each call.
        nodes: number of hosts, each with an address of this machine.
    """

    def __init__(
        self,
        num_proc: int,
        process_sets: Sequence[Sequence[int]] | Literal["dynamic"] = (),
        timeout: float = 120,
        nodes: int = 1,
    ) -> None:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
        from horovod.runner.http.http_server import RendezvousServer

        self.num_proc = num_proc
        self.timeout = timeout
        self.tasks = 0
        self.folder = Path(tempfile.mkdtemp())
        self.rendezvous = RendezvousServer()
        hosts = ",".join(f"127.0.0.{1 + node}:{num_proc // nodes}" for node in range(nodes))
        slots = get_host_assignments(parse_hosts(hosts), num_proc)
        run = create_run_env_vars("127.0.0.1", ["lo"], self.rendezvous.start())
        self.rendezvous.init(slots)
        self.processes = []
        for slot in slots:
            environment = {name: str(value) for name, value in {**run, **create_slot_env_vars(slot)}.items()}
            arguments = (self.folder, environment, process_sets, os.getpid())
            self.processes.append(fork_server().Process(target=_main, args=arguments, daemon=True))
            self.processes[-1].start()

    def send(self, body: Callable[..., Any], *args: Any) -> list[Path]:
        """Has every process call body(*args); returns the files of the results, by rank."""
        torch.save((body.__module__, body.__name__, args), self.folder / "writing")
        (self.folder / "writing").rename(self.folder / f"{self.tasks}.task")
        paths = [self.folder / f"{self.tasks}.{rank}" for rank in range(self.num_proc)]
        self.tasks += 1
        return paths

    def __call__(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls body(*args) in every process and returns the results by rank; an error is raised with its traceback."""
        return self.results(self.send(body, *args))

    def results(self, paths: Sequence[Path]) -> list[Any]:
        """Waits for files of send() and returns what the calls returned; an error is raised with its traceback."""
        deadline = time.monotonic() + self.timeout
        for path in paths:
            process = self.processes[int(path.suffix[1:])]
            while not path.exists():
                if process.exitcode is not None or time.monotonic() > deadline:
                    logs = "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))
                    raise RuntimeError(f"rank {path.suffix[1:]} ended or hangs:\n{logs[-4000:]}")
                time.sleep(0.02)
        results = [torch.load(path, weights_only=False) for path in paths]
        for path, (error, _) in zip(paths, results, strict=True):
            assert error is None, f"rank {path.suffix[1:]}: {error}"
        return [value for _, value in results]

    def close(self) -> None:
        """Ends the processes."""
        (self.folder / f"{self.tasks}.task").touch()
        for process in self.processes:
            process.join(30)
            process.kill()
            process.join()
        self.rendezvous.stop()
        shutil.rmtree(self.folder)


def _main(folder: Path, environment: dict[str, str], sets: Sequence[Sequence[int]] | str, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with (folder / f"{environment['HOROVOD_RANK']}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    _serve(folder, sets)


def _serve(folder: Path, sets: Sequence[Sequence[int]] | str) -> None:
    import horovod.torch as hvd

    global process_set
    torch.set_num_threads(1)
    known = sets if isinstance(sets, str) else [hvd.ProcessSet(list(ranks)) for ranks in sets]
    hvd.init(process_sets=known)
    process_set = hvd.global_process_set if isinstance(known, str) or not known else known[0]
    task = 0
    while True:
        path = folder / f"{task}.task"
        while not path.exists():
            time.sleep(0.02)
        if path.stat().st_size == 0:
            return
        module, name, args = torch.load(path, weights_only=False)
        try:
            result = None, getattr(importlib.import_module(module), name)(*args)
        except Exception:
            result = traceback.format_exc(), None
        mine = folder / f"{task}.{hvd.rank()}"
        torch.save(result, mine.with_suffix(f".writing{hvd.rank()}"))
        mine.with_suffix(f".writing{hvd.rank()}").rename(mine)
        task += 1


def _end_with(pid: int) -> None:
    """Ends this process when the tests are gone, even while it hangs in a collective."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(1)
    os._exit(1)
