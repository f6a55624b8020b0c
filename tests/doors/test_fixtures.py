"""Files that an earlier version saved: they load, and ten steps later every bit is where that version had it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from support.ranks import run_ranks

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.append(str(FIXTURES))
from write import run  # noqa: E402


def resume(rank, world_size, folder):
    return run(rank, world_size, folder, resume=True)


@pytest.mark.parametrize("version", sorted(p.name for p in FIXTURES.iterdir() if (p / "alone.pt").exists()))
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_an_earlier_version_saved_goes_on_with_its_bits(tmp_path, version, world_size):
    folder = shutil.copytree(FIXTURES / version, tmp_path / version)
    for rank, outcome in enumerate(run_ranks(world_size, resume, str(folder))):
        expected = torch.load(folder / f"outcome_{rank}_of_{world_size}.pt", weights_only=True)
        assert outcome.keys() == expected.keys()
        for name in expected:
            assert torch.equal(outcome[name], expected[name]), name
