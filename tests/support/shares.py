"""Shares of several ranks: written and read as a user does, and how they are divided among another number of ranks."""

import numpy as np
import torch

import dgc


def save_all(run, folder):
    """What a user does: model and optimizer first, by one rank, then DGC's part."""
    if run.state.exchange.rank == 0:
        parts = {"model": run.net, "optimizer": run.optimizer}
        torch.save({key: part.state_dict() for key, part in parts.items()}, f"{folder}/rest.pt")
    dgc.checkpoint.save(run.state, f"{folder}/dgc")


def load_all(run, folder, **options):
    saved = torch.load(f"{folder}/rest.pt", weights_only=True)
    run.net.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    dgc.checkpoint.load(run.state, f"{folder}/dgc", **options)


def rows(before, now):
    """The matrix, from its definition: lengths of intervals' intersections, times N/M."""
    pieces = np.array([[s, s + 1] for s in range(before)], dtype=float)
    matrix = np.zeros((now, before))
    for r in range(now):
        low, high = r * before / now, (r + 1) * before / now
        matrix[r] = np.clip(np.minimum(high, pieces[:, 1]) - np.maximum(low, pieces[:, 0]), 0, None) * now / before
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(matrix.sum(0), now / before)
    return matrix


def mean(results, kind, name):
    return sum(r[kind][name].double() for r in results) / len(results)
