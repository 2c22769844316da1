"""The grid of priors: each of its networks is the one that would be trained alone, and folds hold their rows out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pukd_ray.selection.grid import Grid, GridFold, GridHead, fit_grid, fit_grid_fold, grid_logits, grid_risk
from pukd_ray.selection.risk import nnpu_risk
from pukd_ray.selection.training import Examples, Training

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING = Training("nnpu", 0.5, 60, 64, 0.01, 0)


def gaussians(seed: int, n_u: int = 600) -> tuple[Examples, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random(n_u) < 0.3
    u = rng.normal(size=(n_u, 5)) + np.where(truth, 2.5, -2.5)[:, None] * np.array([1, 1, 0, 0, 0])
    p = rng.normal(size=(50, 2, 5)) + 2.5 * np.array([1, 1, 0, 0, 0])
    return Examples(p.astype(np.float16), u.astype(np.float16)), truth


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_objective_is_the_sum_of_nnpus(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(40, 3, generator=generator)).requires_grad_()
    priors = torch.tensor([0.05, 0.3, 0.9])
    labels = torch.cat([torch.ones(10), -torch.ones(30)])
    (found,) = torch.autograd.grad(grid_risk(logits, 10, priors), logits)
    parts = []
    for g, prior in enumerate(priors.tolist()):
        column = logits.detach()[:, g].clone().requires_grad_()
        _, objective = nnpu_risk(column, labels, prior)
        parts.append(torch.autograd.grad(objective, column)[0])
    torch.testing.assert_close(found, torch.stack(parts, 1), rtol=1e-4, atol=1e-7)


def test_networks_start_alike_and_do_not_disturb_each_other() -> None:
    examples, _ = gaussians(0)
    head = GridHead(examples.u, 3, seed=4)
    logits = grid_logits(head, examples.u)
    np.testing.assert_allclose(logits, logits[:1].repeat(3, 0), rtol=1e-5, atol=1e-6)
    alone = grid_logits(fit_grid(examples, TRAINING, [0.3]), examples.u)
    together = grid_logits(fit_grid(examples, TRAINING, [0.1, 0.3, 0.6]), examples.u)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-3, atol=1e-3)
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_a_larger_prior_takes_more() -> None:
    examples, truth = gaussians(1)
    shares = (grid_logits(fit_grid(examples, TRAINING, [0.15, 0.3, 0.8]), examples.u) > 0).mean(1)
    assert shares[0] <= shares[1] < shares[2]
    assert shares[1] == pytest.approx(truth.mean(), abs=0.03)


def test_a_fold_is_scored_by_what_has_not_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, _ = gaussians(2)
    from pukd_ray.selection import grid

    seen: list[Examples] = []
    original = grid.fit_grid

    def spy(features: Examples, *args: object) -> object:
        seen.append(features)
        return original(features, *args)

    monkeypatch.setattr(grid, "fit_grid", spy)
    rows = np.arange(0, 50, 5), np.arange(0, 600, 5)
    fold = fit_grid_fold(examples, rows, TRAINING, [0.1, 0.3])
    held_out = {row.tobytes() for row in examples.u[rows[1]]}
    assert held_out.isdisjoint(row.tobytes() for row in seen[0].u)
    assert len(seen[0].p) == 40
    assert (fold.p_logits.shape, fold.u_logits.shape) == ((2, 10), (2, 120))


def test_folds_go_back_to_their_rows_and_grids_join_in_order() -> None:
    u = np.arange(12, dtype=np.float32).reshape(2, 6)
    folds = [
        GridFold(np.array([k]), np.arange(k, 6, 2), np.full((2, 1), k, np.float32), u[:, k::2], (0, 0)) for k in (0, 1)
    ]
    coarse = Grid.of([0.1, 0.5], folds)
    np.testing.assert_array_equal(coarse.u, u)
    np.testing.assert_array_equal(coarse.p, [[0, 1], [0, 1]])
    joined = coarse.joined(Grid(np.array([0.3]), np.full((1, 2), 9.0), np.full((1, 6), 9.0)))
    np.testing.assert_array_equal(joined.priors, [0.1, 0.3, 0.5])
    np.testing.assert_array_equal(joined.u[:, 0], [0, 9, 6])
