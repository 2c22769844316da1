"""What a selection is worth, estimated without truth: precision and recall, with 90 % intervals.

By two estimators, which fail in different ways (docs/method.md, "Quality of a selection"), and half of each:

- modelled: the mean of P(relevant) over the selection, and its sum there relative to its sum over all scored images;
- counted: the recall of held-out P, and the precision it stands for, prior * recall / share selected. No model of the
  logits, but P, weighted, must look like the relevant images, and it has only as many steps as P has images.

Both would be too high where P is a biased sample, which scores higher than the relevant images of U do: each refit of
the calibration brings a `tilt` of P's weights, as large as the test of the assumption cannot rule out.
"""

from __future__ import annotations

import numpy as np

from pukd_ray.run.records import EstimatedQuality
from pukd_ray.selection.calibration import Calibration, resample_weights, tilted


def estimate_quality(
    everything: np.ndarray,
    selected: np.ndarray,
    logits: np.ndarray,
    p_logits: np.ndarray,
    p_weights: np.ndarray,
    calibration: Calibration,
    bootstrap: list[Calibration],
) -> EstimatedQuality:
    """`precision` and `recall` of this selection from this corpus, each with its `_interval`.

    Args:
        everything: scored images in bins of similar logits, [M].
        selected: those of them that are selected, [M].
        logits: mean logit of each bin, [M].
        p_logits: held-out logits of P, [n_p].
        p_weights: by which P stands for the relevant images of the corpus, [n_p] (`positive_weights`).
        calibration: of these logits.
        bootstrap: its refits on resampled P and units. The intervals come from both estimators with each of them and
            resampled P, and from how a count of images spreads around its probability.
    """
    filled = np.flatnonzero(everything)
    filled = filled[np.argsort(logits[filled], kind="stable")]
    taken = np.interp(p_logits, logits[filled], selected[filled] / everything[filled])
    n_selected, n_relevant = float(selected.sum()), float(everything @ calibration(logits))

    def quality(fit: Calibration, weights: np.ndarray) -> list[tuple[float, float]]:
        """(precision, recall), modelled and counted."""
        probability = fit(logits)
        inside, relevant = float(selected @ probability), float(everything @ probability)
        if not (n_selected and relevant):
            return [(0.0, 0.0)] * 2
        weights = tilted(weights, p_logits, fit.tilt)
        recall = float(weights @ taken / weights.sum())
        return [(inside / n_selected, inside / relevant), (min(1.0, relevant * recall / n_selected), recall)]

    precision, recall = np.mean(quality(calibration, p_weights), axis=0).tolist()
    rng = np.random.default_rng(0)
    drawn = [p_weights * resample_weights(rng, len(p_logits)) for _ in bootstrap]
    draws = np.array([both for refit, w in zip(bootstrap, drawn, strict=True) for both in quality(refit, w)])
    images = np.maximum(np.round([n_selected, n_relevant]), 1)
    draws = rng.binomial(images.astype(np.int64), np.clip(draws, 0, 1)) / images
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return {
        "precision": precision,
        "precision_interval": [float(min(low[0], precision)), float(max(high[0], precision))],
        "recall": recall,
        "recall_interval": [float(min(low[1], recall)), float(max(high[1], recall))],
    }
