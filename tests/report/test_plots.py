"""Numbers behind the plots, and what the SVG is made of."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from scipy.special import expit

from pukd_ray.report import plots
from pukd_ray.selection.calibration import Calibration

HISTOGRAM = {
    "logit": [-3.0, -1.0, 1.0, 3.0],
    "edges": [-2.0, 0.0, 2.0],
    "all": [40, 30, 10, 20],
    "selected": [0, 0, 10, 20],
    "relevant": [0, 3, 5, 20],
}


def test_even_bins_keep_totals_and_spread_evenly() -> None:
    edges, counts = plots.even_bins(HISTOGRAM, 8)
    # The open bins end at -4 and 4, less 0.05 % of all images.
    np.testing.assert_allclose(edges[[0, -1]], [-4 + 2 * 0.05 / 40, 4 - 2 * 0.05 / 20])
    assert [round(counts[k].sum()) for k in ("all", "selected", "relevant")] == [100, 30, 28]
    np.testing.assert_allclose(counts["all"], [20, 20, 15, 15, 5, 5, 10, 10], atol=0.2)
    np.testing.assert_allclose(counts["selected"], [0, 0, 0, 0, 5, 5, 10, 10], atol=0.2)


def test_even_bins_of_empty_ends_and_of_one_value() -> None:
    edges, counts = plots.even_bins(HISTOGRAM | {"all": [0, 30, 10, 0], "logit": [0.0, -1.0, 1.0, 0.0]}, 4)
    assert -2.01 < edges[0] < edges[-1] < 2.01
    assert counts["all"].sum() == pytest.approx(40)
    edges, counts = plots.even_bins({"logit": [0.0, 1.0], "edges": [1.0], "all": [0, 9], "selected": [0, 9]}, 4)
    assert np.isfinite(edges).all()
    assert counts["all"].sum() == pytest.approx(9)
    assert "relevant" not in counts


def test_reliability_and_calibration_error() -> None:
    rows = plots.reliability(HISTOGRAM, Calibration(1.0, 0.0), bins=2)
    low, high = (40 * expit(-3) + 30 * expit(-1)) / 70, (10 * expit(1) + 20 * expit(3)) / 30
    assert [r["n"] for r in rows] == [70, 30]
    np.testing.assert_allclose([r["predicted"] for r in rows], [low, high])
    np.testing.assert_allclose([r["share"] for r in rows], [3 / 70, 25 / 30])
    error = 0.7 * abs(low - 3 / 70) + 0.3 * abs(high - 25 / 30)
    assert plots.calibration_error(rows) == pytest.approx(error)


def test_svg_is_bare_follows_the_page_and_leaves_no_settings_behind() -> None:
    before = dict(mpl.rcParams)
    drawn = [plots.score_histogram(HISTOGRAM, [0.0], "cut <&> $a$", log=log) for log in (False, True)]
    assert dict(mpl.rcParams) == before
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert "http" not in svg
        assert "#00000" not in svg
        assert "var(--blue)" in svg
        assert "cut <&> $a$" in "".join(root.itertext())
    ids = [{e.get("id") for e in ElementTree.fromstring(svg).iter() if e.get("id")} for svg in drawn]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])


def test_the_same_input_draws_the_same_svg() -> None:
    curves = {"student": [(1, 0.5), (2, 0.25)]}
    assert plots.curves_plot(curves, "loss") == plots.curves_plot(curves, "loss")


@pytest.mark.parametrize("count", [1, 40, 41, 1000])
def test_classes_plot_of_any_size(count: int) -> None:
    names = [f"{'very long ' * 5}{k}" for k in range(count)]
    text = "".join(ElementTree.fromstring(plots.classes_plot(names, [0] * count, [1.0] * count)).itertext())
    assert ("very long very lo…" in text) == (count <= 40)
    assert ("class index" in text) == (count > 40)


def test_cuts_of_classes_that_differ_are_a_band() -> None:
    svg = plots.score_histogram(HISTOGRAM, [0.5, 1.5], "cuts of the classes")
    assert "cuts of the classes" in svg
