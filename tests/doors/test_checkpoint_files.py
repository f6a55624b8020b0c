"""Checkpoints of one rank: complete or not there, and refused where files are damaged or of something else."""

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dgc
from support.alone import Alone
from support.models import normals
from support.training import LARGE, SHAPES


def alone(late=None, **config) -> Alone:
    return Alone(SHAPES, dgc.DGCConfig(**{"density": 0.01, **config}), late=late, lr=0.5, momentum=0.5)


@pytest.fixture
def saved(tmp_path) -> Path:
    one = alone()
    for step in range(3):
        one.train(normals(SHAPES, step))
    dgc.checkpoint.save(one.state, tmp_path / "dgc")
    return tmp_path / "dgc"


def refused(directory: Path, match: str) -> None:
    """Loading raises, and nothing has changed."""
    one = alone()
    one.train(normals(SHAPES, 9))
    v, u = one.state.memory.residual.clone(), one.state.memory.momentum.clone()
    with pytest.raises(ValueError, match=match):
        dgc.checkpoint.load(one.state, directory)
    assert torch.equal(one.state.memory.residual, v)
    assert torch.equal(one.state.memory.momentum, u)
    assert one.state.step == 1
    one.train(normals(SHAPES, 10))


def test_what_was_not_completed_does_not_count(saved):
    saved.rename(f"{saved}.partial")
    refused(saved, r"expected a checkpoint, but .*dgc\.partial is one that was not completed")
    refused(saved.with_name("other"), "expected a checkpoint, but there is none")
    shutil.copytree(f"{saved}.partial", f"{saved}.replaced")  # killed between the two renames
    refused(saved, r"the run died when it replaced one: rename .*dgc\.replaced, which is complete")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, file, keep):
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(keep * len(content))])
    refused(saved, "truncated" if file == "__0_0.distcp" else "EOFError|UnpicklingError")


@pytest.mark.parametrize("seed", range(15))
def test_flipped_bytes_are_refused_or_change_nothing(saved, seed):
    # Of a zip file's padding and names some bytes mean nothing; what is loaded has to be what was saved.
    good = alone()
    dgc.checkpoint.load(good.state, saved)
    file = saved / ("__0_0.distcp" if seed % 3 else ".metadata")
    content = bytearray(file.read_bytes())
    for position in torch.randint(len(content), (3,), generator=torch.Generator().manual_seed(seed)).tolist():
        content[position] ^= 1 << seed % 8
    file.write_bytes(content)
    one = alone()
    error = ""
    try:
        dgc.checkpoint.load(one.state, saved)
    except ValueError as caught:
        error = str(caught)
    assert not error or "No rank's state has changed" in error
    assert one.state.step == (0 if error else 3)
    assert torch.equal(one.state.memory.residual, good.state.memory.residual * (not error))
    assert error or torch.equal(one.state.memory.momentum, good.state.memory.momentum)


def test_a_flipped_bit_of_a_value_is_refused(saved):
    file = saved / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    one = alone()
    dgc.checkpoint.load(one.state, saved)
    at = content.index(bytes(one.state.memory.residual_of("e").view(-1)[:8].view(torch.uint8).tolist()))
    content[at] ^= 1
    file.write_bytes(content)
    refused(saved, r"rank 0: residual\.e is not what was saved: the file is damaged")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_metadata_that_wants_to_run_something_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(saved, r"UnpicklingError: \.metadata: expected .*, got posix\.mkdir")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    dcp.save({"model": torch.zeros(3)}, checkpoint_id=tmp_path / "dgc", no_dist=True)
    refused(tmp_path / "dgc", "expected what dgc.checkpoint.save.. writes, got an entry 'model'")


def test_another_models_checkpoint_is_refused_with_the_names(saved):
    other = Alone({**SHAPES, "e": (260, 261), "z": (200, 200)}, dgc.DGCConfig(0.01), lr=0.5, momentum=0.5)
    with pytest.raises(ValueError, match=re.escape("residual of z is missing; residual of e has shape (260, 260)")):
        dgc.checkpoint.load(other.state, saved)


def test_a_directory_is_replaced_when_the_new_one_is_complete(saved):
    one = alone()
    dgc.checkpoint.load(one.state, saved)
    one.train(normals(SHAPES, 7))
    Path(f"{saved}.partial").mkdir()
    (Path(f"{saved}.partial") / "__5_0.distcp").write_text("of a run that was killed")
    dgc.checkpoint.save(one.state, saved)
    two = alone()
    dgc.checkpoint.load(two.state, saved)
    assert two.state.step == two.state.stats.steps == 4
    assert two.state.residual_norm == one.state.residual_norm > 1
    assert torch.equal(two.state.memory.residual, one.state.memory.residual)
    assert [p.name for p in saved.parent.iterdir()] == ["dgc"]
    assert sorted(p.name for p in saved.iterdir()) == [".metadata", "__0_0.distcp"]


def test_saving_between_backward_and_step_is_refused(tmp_path):
    one = alone()
    one.backward(normals(SHAPES, 0))
    with pytest.raises(RuntimeError, match=r"between optimizer\.step"):
        dgc.checkpoint.save(one.state, tmp_path / "dgc")


def test_a_slash_at_the_end_and_a_relative_path_mean_the_same(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    one = alone()
    dgc.checkpoint.load(one.state, "dgc/")
    one.train(normals(SHAPES, 7))
    dgc.checkpoint.save(one.state, "dgc/")
    two = alone()
    dgc.checkpoint.load(two.state, "dgc")
    assert two.state.step == 4
    assert [p.name for p in saved.parent.iterdir()] == ["dgc"]


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_is_no_checkpoint_is_not_replaced(saved, what):
    one = alone()
    target = saved if what == "directory" else saved.with_name("file")
    kept = saved / "rest.pt" if what == "directory" else target
    kept.write_text("the model")
    with pytest.raises(RuntimeError, match=f"FileExistsError: expected a name for this alone.*{kept.name}"):
        dgc.checkpoint.save(one.state, target)
    assert kept.read_text() == "the model"
    assert not Path(f"{target}.partial").exists()


def test_loading_forgets_an_error_that_has_not_been_raised_and_momentum_that_is_not_in_the_file():
    plain = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5)
    plain.train(normals(SHAPES, 0))
    one = alone(late=True)
    gradients = normals(SHAPES, 1)
    gradients["a"][0, 0] = torch.nan
    one.train(gradients)
    one.backward(normals(SHAPES, 2))  # finds it, and keeps it for step()
    one.state.load_state_dict(plain.state.state_dict())
    assert not one.state.memory.momentum.any()
    one.train(normals(SHAPES, 3))
    assert one.state.step == 2


def test_momentum_that_differs_between_ranks_is_averaged_in_a_dense_phase_after_loading_too():
    one = alone()
    one.state.dense = True
    for step in range(2):
        one.train(normals(SHAPES, step))
    other = alone()
    other.train(normals(SHAPES, 2))
    loaded = {"version": 1, **other.state.state_dict()["ranks"]["0"], "dense": True}
    assert set(loaded["diverged"]) == LARGE
    one.state.load_state_dict(loaded)
    one.train(normals(SHAPES, 3))
    assert one.state.memory.diverged == set()
