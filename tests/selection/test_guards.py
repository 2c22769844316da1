"""What a run warns of once the selector is fitted."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.selection.calibration import Binned
from pukd_ray.selection.crossfit import FitReport
from pukd_ray.selection.guards import fit_warnings
from pukd_ray.selection.verdict import Verdict, given


def report(p: np.ndarray, u: np.ndarray, prior: float) -> FitReport:
    return FitReport(
        steps=10,
        proxy_accuracy=0.9,
        proxy_curve=((10, 0.9),),
        recall=1.0,
        selected_share=prior,
        calibration=Binned.of(p, u).fit(prior)[0],
        bootstrap=(),
        p_logits=p,
        p_weights=np.ones(len(p)),
        u_logits=u,
    )


@pytest.mark.parametrize(
    ("shift", "verdict", "warning"),
    [
        (0.0, Verdict(0.25, 0.22, 0.28, 0.25, "high", (), None, "density_ratio"), None),
        (0.0, given(0.25), None),
        (6.0, Verdict(0.25, 0.22, 0.28, 0.25, "high", (), None, "density_ratio"), "than anything in the corpus"),
        (0.0, given(0.6), "than what a prior of 0.6 takes of the corpus: it is too high"),
    ],
)
def test_p_that_scores_too_high_is_told_from_a_corpus_that_parts_cleanly(
    shift: float, verdict: Verdict, warning: str | None
) -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(0, 1, 4000) + 8 * (np.arange(4000) < 1000)
    fit = report(rng.normal(8 + shift, 1, 200), u, verdict.prior)
    assert fit.calibration.at_bound  # in each of them
    warnings = fit_warnings(fit, verdict)
    assert [text for text in warnings if "scores higher" in text] == warnings
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
