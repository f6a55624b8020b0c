"""One rank: it trains from a checkpoint to the end, and writes down what it has after every step."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import dgc

from .run import (
    COMPRESSED,
    GROWTH_INTERVAL,
    HANGS,
    INIT_SCALE,
    Given,
    Run,
    event_of,
    gradients,
)


class Trainer:
    """One rank's model and all that is saved with it."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder, self.rank = run, folder, dist.get_rank()
        self.net = Given()
        self.model = DistributedDataParallel(self.net, bucket_cap_mb=0.05, gradient_as_bucket_view=True)
        groups = [{"params": [self.net.get_parameter(n) for n in names], **of} for names, of in run.groups.items()]
        self.optimizer = dgc.AdamW(groups, weight_decay=0.0) if run.adamw else dgc.SGD(groups, lr=0.25)
        self.scaler = GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL)
        mesh = init_device_mesh("cpu", (run.nodes, run.places)) if run.nodes else None
        self.state = dgc.DGCState(
            self.model.named_parameters(), self.optimizer, run.config, grad_scaler=self.scaler, mesh=mesh
        )
        self.state.register(self.model)

    def step(self, step: int) -> None:
        """Does what event_of() says."""
        event = event_of(self.run, step)
        *first, last = gradients(self.run, step, self.rank)
        if event.dense != self.state.dense:
            self.state.dense = event.dense
        self.optimizer.zero_grad()
        with self.model.no_sync():
            for given in first:
                self.scaler.scale(self.model(given)).backward()
        self.scaler.scale(self.model(last)).backward()
        if event.discarded:
            self.state.discard(drop_gradient=False)
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def save(self, finished: int) -> None:
        """Saves after so many steps, and keeps the two latest."""
        if not self.run.adamw:
            snapshot = {
                "u": self.state.memory.of("momentum")["momentum"].flatten().clone(),  # a view of all
                "v": self.residual()["momentum"],
                "parameter": self.net.get_parameter("momentum").detach(),
            }
            torch.save(snapshot, self.folder / f"momentum{finished}.{self.rank}.pt")
        directory = self.folder / f"step{finished}"
        if self.rank == 0:
            directory.mkdir(exist_ok=True)
            parts = {key: part.state_dict() for key, part in self._replicated().items()}
            torch.save({**parts, "finished": finished}, directory / "replicated.pt")
        dgc.checkpoint.save(self.state, directory / "dgc")
        if self.rank == 0:
            for old in saved(self.folder)[:-2]:
                shutil.rmtree(self.folder / f"step{old}")

    def load(self, finished: int) -> int:
        """Takes up where save() was called, and returns after how many steps that was."""
        directory = self.folder / f"step{finished}"
        replicated = torch.load(directory / "replicated.pt", weights_only=True)
        for key, part in self._replicated().items():
            part.load_state_dict(replicated[key])
        dgc.checkpoint.load(self.state, directory / "dgc")
        return int(replicated["finished"])

    def _replicated(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "scaler": self.scaler}

    def residual(self) -> dict[str, Tensor]:
        """Returns what this rank keeps of the residual of each parameter, flat."""
        _ = self.state.stats  # see digest()
        parts = {name: self.state.memory.residual_of(name) for name in COMPRESSED}
        return {name: part.flatten().clone() for name, part in parts.items() if part is not None}

    def digest(self) -> int:
        """Returns a number that differs where any bit of the training state does."""
        _ = self.state.stats  # a step that the scaler has left out is taken back by now
        memory = self.state.memory
        assert memory.kinds
        tensors = [*self.net.parameters(), memory.residual, *memory.kinds.values()]
        bits = [int(t.detach().view(torch.int32).sum(dtype=torch.int64)) for t in tensors]
        return hash((*bits, self.state.step, self.state.dense, *self.scaler.state_dict().values()))


@dataclass(frozen=True)
class Record:
    """What a rank writes down after every step, and after a restart."""

    attempt: int
    finished: int
    """Steps, from the beginning of the run."""
    digest: int
    resident: int
    """Bytes of resident memory."""
    heap: int
    """Those of them that are no file's."""
    norm: float
    """Of the residual."""


def resident() -> tuple[int, int]:
    """Returns resident memory in bytes, all of it and the part that is no file's."""
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    size = os.sysconf("SC_PAGE_SIZE")
    return pages[1] * size, (pages[1] - pages[2]) * size


def saved(folder: Path) -> list[int]:
    """Returns after how many steps there are complete checkpoints, the latest last."""
    return sorted(int(path.parent.name[len("step") :]) for path in folder.glob("step*/dgc"))


def worker(rank: int, attempt: int, run: Run, folder: Path, resume: int, progress: Any) -> None:
    """Trains from a checkpoint to the end; progress is n.5 while the checkpoint after n steps is written."""
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / f"store{attempt}"), run.ranks)
        dist.init_process_group(
            "gloo", rank=rank, world_size=run.ranks, store=store, timeout=timedelta(seconds=2 * HANGS)
        )
        trainer = Trainer(run, folder)
        finished = trainer.load(resume) if resume else 0
        with (folder / f"rank{rank}.log").open("a", buffering=1) as log:  # a line is there once it is written

            def record() -> None:
                norm = float(torch.linalg.vector_norm(trainer.state.memory.residual))
                print(attempt, finished, trainer.digest(), *resident(), norm, file=log)
                progress[rank] = finished

            record()
            while finished < run.steps:
                trainer.step(finished)
                finished += 1
                record()
                if run.saves_after(finished):
                    progress[rank] = finished + 0.5
                    trainer.save(finished)
        torch.save(
            {
                "parameters": trainer.net.state_dict(),
                "residual": trainer.residual(),
                "applied": trainer.state.step,
                "scale": trainer.scaler.get_scale(),
            },
            folder / f"final{rank}.pt",
        )
        dist.destroy_process_group()
    except Exception as error:
        (folder / f"error{attempt}.{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)
