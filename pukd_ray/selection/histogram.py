"""Scores in bins: what estimates of a selection need of a corpus, however large it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pukd_ray.run.records import EstimatedQuality
from pukd_ray.selection.calibration import Calibration
from pukd_ray.selection.quality import estimate_quality

BINS = 512
BINNED = ("all", "selected", "logit_sum")
"""What `bin_scores` counts in each bin."""


def bin_edges(held_out_logits: np.ndarray) -> np.ndarray:
    """Edges float64 [at most BINS + 1] that part held-out logits [n] of P and U evenly; the outer ones are infinite."""
    inner = np.unique(np.quantile(held_out_logits.astype(np.float64), np.linspace(0, 1, BINS - 1)))
    edges: np.ndarray = np.r_[-np.inf, inner, np.inf]
    return edges


def bin_scores(logits: np.ndarray, selected: np.ndarray, edges: np.ndarray) -> dict[str, np.ndarray]:
    """Of each bin [M] the images, `all` int64 and `selected` int64, and the sum of their logits, `logit_sum` float64.

    Args:
        logits: of scored images, [n].
        selected: which of them are selected, bool [n].
        edges: of the bins, [M + 1].

    Returns:
        Sums: those of parts of a corpus add up to those of the whole.
    """
    return {
        "all": np.histogram(logits, edges)[0],
        "selected": np.histogram(logits[selected], edges)[0],
        "logit_sum": np.histogram(logits, edges, weights=logits.astype(np.float64))[0],
    }


def estimate_selection(
    binned: Mapping[str, np.ndarray],
    p_logits: np.ndarray,
    p_weights: np.ndarray,
    calibration: Calibration,
    bootstrap: list[Calibration],
) -> EstimatedQuality:
    """`estimate_quality` of a selection whose corpus was binned by `bin_scores`; the other arguments are its own.

    `p_weights` in float32, as `selector/held_out.parquet` keeps them.
    """
    return estimate_quality(
        binned["all"],
        binned["selected"],
        binned["logit_sum"] / np.maximum(binned["all"], 1),
        p_logits.astype(np.float64),
        p_weights.astype(np.float32).astype(np.float64),
        calibration,
        bootstrap,
    )
