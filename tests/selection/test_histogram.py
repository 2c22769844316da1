"""Binned scores: as many as there are, and an estimate that hardly differs from that of single scores."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.selection.calibration import Calibration
from pukd_ray.selection.histogram import BINS, bin_edges, bin_scores, estimate_selection
from pukd_ray.selection.quality import estimate_quality


def test_edges_part_the_held_out_logits_evenly_and_leave_no_score_out() -> None:
    logits = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    edges = bin_edges(logits)
    assert len(edges) == BINS + 1
    assert (edges[0], edges[-1]) == (-np.inf, np.inf)
    inner = np.histogram(logits, edges[1:-1])[0]
    assert inner.sum() == len(logits)
    assert inner.min() > 0.5 * len(logits) / BINS
    assert np.histogram([-1e9, 1e9], edges)[0].sum() == 2
    assert len(bin_edges(np.zeros(9))) == 3  # ties leave fewer


def test_parts_of_a_corpus_add_up() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=3000).astype(np.float32)
    selected = logits > 0.5
    edges = bin_edges(logits[:500])
    whole = bin_scores(logits, selected, edges)
    parts = [bin_scores(logits[part], selected[part], edges) for part in (slice(0, 1000), slice(1000, None))]
    for name, values in whole.items():
        np.testing.assert_allclose(sum(part[name] for part in parts), values, rtol=1e-12)
    assert (whole["all"].sum(), whole["selected"].sum()) == (3000, selected.sum())
    assert whole["logit_sum"].sum() == pytest.approx(float(logits.astype(np.float64).sum()))


def test_bins_hardly_change_an_estimate() -> None:
    rng = np.random.default_rng(2)
    u, p = rng.normal(-1, 2, 20_000).astype(np.float32), rng.normal(2, 1, 400).astype(np.float32)
    calibration, weights = Calibration(1.0, -0.5), rng.uniform(0.5, 1.5, 400)
    refits = [Calibration(1.0, offset) for offset in rng.normal(-0.5, 0.1, 50)]
    binned = bin_scores(u, u > 0, bin_edges(np.r_[p, u]))
    found = estimate_selection(binned, p, weights, calibration, refits)
    single = estimate_quality(np.ones(len(u)), (u > 0).astype(float), u, p, weights, calibration, refits)
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(single[name], abs=0.01)
        assert found[f"{name}_interval"] == pytest.approx(single[f"{name}_interval"], abs=0.02)
