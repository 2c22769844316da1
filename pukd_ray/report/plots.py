"""Plots of the page as inline SVG, coloured by the page's own CSS variables so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pukd_ray.run.records import EvidenceRecord, Histogram, PriorRecord
from pukd_ray.selection.calibration import Calibration

P = ParamSpec("P")

# Colours that Matplotlib writes and the page's variables they stand for.
INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE = (f"#00000{i}" for i in range(1, 8))
_VARIABLES = dict(
    zip(
        (INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE),
        ("ink", "muted", "grid", "blue", "orange", "green", "purple"),
        strict=True,
    )
)

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # class names are anything
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
MAX_NAMED_CLASSES = 40
HISTOGRAM_BINS = 60
WIDE_POINTS = 450  # wider drawings take the page's whole width


def _drawing(draw: Callable[P, tuple[Figure, str]]) -> Callable[P, Markup]:
    """Make a function that returns (figure, description) return inline SVG."""

    @wraps(draw)
    def as_svg(*args: P.args, **kwargs: P.kwargs) -> Markup:
        sink = io.StringIO()
        with mpl.rc_context(_STYLE):
            figure, description = draw(*args, **kwargs)
            # Each drawing has its own salt: its ids must not be those of a drawing that is hidden.
            with mpl.rc_context({"svg.hashsalt": f"{draw.__name__} {description}"}):
                figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
        return Markup(_inline(sink.getvalue(), description))

    return as_svg


def _inline(svg: str, description: str) -> str:
    """Only what HTML needs of a stand-alone SVG file: no prologue, metadata, name spaces or ids of groups."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box
    wide = " wide" if float(box.group(1).split()[2]) > WIDE_POINTS else ""
    head = f'<svg class="plot{wide}" viewBox="{box.group(1)}" role="img" aria-label="{escape(description)}">'
    body = head + body[body.index(">") + 1 :]
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    return "\n".join(line.strip() for line in body.splitlines() if line.strip())


def _axes(width: float = 5.6, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, columns: int = 3) -> None:
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2, borderaxespad=0.2)


def shorten(name: str, width: int = 18) -> str:
    """A name that fits beside an axis."""
    name = " ".join(name.split())
    return name if len(name) <= width else name[: width - 1] + "…"


# -- scores -----------------------------------------------------------------------------------------------------


def _outer_edges(histogram: Histogram) -> np.ndarray:
    """Edges of all bins; the outermost, open ones end as far beyond their mean as it is from their finite edge."""
    edges, logit, count = (np.array(histogram[k], float) for k in ("edges", "logit", "all"))
    low = 2 * logit[0] - edges[0] if count[0] else edges[0]
    high = 2 * logit[-1] - edges[-1] if count[-1] else edges[-1]
    outer: np.ndarray = np.r_[min(low, edges[0] - 1e-3), edges, max(high, edges[-1] + 1e-3)]
    return outer


def even_bins(histogram: Histogram, bins: int = HISTOGRAM_BINS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(edges [bins + 1], counts [bins] of each kind): the summary's uneven bins on an even axis.

    Images are taken as spread evenly within a bin. The ends hold what lies beyond, so totals are kept.
    """
    edges = _outer_edges(histogram)
    total = np.r_[0.0, np.cumsum(histogram["all"])]
    ends = np.interp([0.0005 * total[-1], 0.9995 * total[-1]], total, edges)
    even = np.linspace(ends[0], max(ends[1], ends[0] + 1e-6), bins + 1)
    counts: dict[str, np.ndarray] = {}
    kinds: tuple[Literal["all", "selected", "relevant"], ...] = ("all", "selected", "relevant")
    for kind in kinds:
        images = histogram.get(kind)
        if images is not None:
            cumulated = np.r_[0.0, np.cumsum(images)]
            at = np.interp(even, edges, cumulated)
            at[0], at[-1] = 0.0, cumulated[-1]
            counts[kind] = np.diff(at)
    return even, counts


@_drawing
def score_histogram(
    histogram: Histogram, cuts: Sequence[float], cut_label: str, *, log: bool = False
) -> tuple[Figure, str]:
    """Logits of all, selected and, where known, relevant images, with the rule's cut."""
    edges, counts = even_bins(histogram)
    figure, axes = _axes(7.4, 3.2)
    axes.stairs(counts["all"], edges, fill=True, color=MUTED, alpha=0.35, label="all scored")
    axes.stairs(counts["selected"], edges, fill=True, color=BLUE, alpha=0.55, label="selected")
    if "relevant" in counts:
        axes.stairs(counts["relevant"], edges, color=ORANGE, linewidth=1.6, label="relevant (truth)")
    if len(cuts) and max(cuts) - min(cuts) > 1e-6:
        axes.axvspan(min(cuts), max(cuts), color=INK, alpha=0.15, label=cut_label)
    elif len(cuts):
        axes.axvline(cuts[0], color=INK, linestyle=(0, (4, 2)), linewidth=1.2, label=cut_label)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    axes.set_xlabel("PU logit")
    axes.set_ylabel("images per bin" + (", log scale" if log else ""))
    _legend(figure, 4)
    return figure, f"Histogram of PU logits{', log scale' if log else ''}"


# -- calibration ------------------------------------------------------------------------------------------------


def reliability(histogram: Histogram, calibration: Calibration, bins: int = 10) -> list[dict[str, float]]:
    """Predicted probability against relevant share in bins of equal width of the prediction; empty bins left out."""
    logit, count, relevant = (np.array(histogram[k], float) for k in ("logit", "all", "relevant"))
    predicted = calibration(logit)
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        n = float(count[inside].sum())
        if n:
            share = float(relevant[inside].sum()) / n
            rows.append({"n": n, "predicted": float(predicted[inside] @ count[inside]) / n, "share": share})
    return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
    """Expected calibration error: mean distance of prediction and share, weighted by images."""
    return sum(r["n"] * abs(r["predicted"] - r["share"]) for r in rows) / sum(r["n"] for r in rows)


@_drawing
def reliability_plot(rows: list[dict[str, float]]) -> tuple[Figure, str]:
    """Predicted probability against the true share of relevant images."""
    figure, axes = _axes(5.2, 3.6)
    x, y, n = (np.array([r[k] for r in rows]) for k in ("predicted", "share", "n"))
    spread = 1.645 * np.sqrt(np.maximum(y * (1 - y), 1 / n) / n)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label="perfect")
    axes.errorbar(
        x,
        y,
        [np.minimum(spread, y), np.minimum(spread, 1 - y)],
        color=BLUE,
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1,
        label="corpus (90 % sampling error)",
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted P(relevant)", ylabel="share truly relevant")
    _legend(figure, 2)
    return figure, "Reliability curve"


@_drawing
def calibration_plot(
    p_logits: np.ndarray, u_logits: np.ndarray, calibration: Calibration, refits: Sequence[Calibration]
) -> tuple[Figure, str]:
    """P(relevant) over held-out logits, and where P and U lie."""
    figure, axes = _axes(5.2, 3.6)
    both = np.concatenate([p_logits, u_logits])
    low, high = np.quantile(both, [0.001, 0.999]) if len(both) else (-1.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), 41)
    z = np.linspace(edges[0], edges[-1], 200)
    for values, colour, name in ((u_logits, MUTED, "held-out corpus"), (p_logits, GREEN, "held-out positives")):
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        height = counts / max(counts.max(), 1)
        axes.stairs(height, edges, fill=True, color=colour, alpha=0.35, label=name)
    if refits:
        band = np.quantile([c(z) for c in refits], [0.05, 0.95], axis=0)
        axes.fill_between(z, band[0], band[1], color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(z, calibration(z), color=BLUE, label="P(relevant), 90 % band")
    axes.set(xlabel="held-out logit", ylabel="probability; peak of histogram = 1", ylim=(0, 1.02))
    _legend(figure, 3)
    return figure, "Calibration curve over held-out logits"


PRIOR_NAMES = {"bbe": "estimate", "config": "from the config", "audit": "audit"}


@_drawing
def prior_plot(prior: PriorRecord) -> tuple[Figure, str]:
    """All that is known of the share of relevant images, one line each, with 90 % intervals."""
    rows: list[tuple[str, float, Sequence[float] | None, str, str]] = [
        (PRIOR_NAMES[prior["source"]], prior["value"], None, "o", INK)
    ]
    if prior["source"] != "config" and prior["trust"] != "none":
        rows[0] = (PRIOR_NAMES[prior["source"]], prior["value"], [prior["lower"], prior["upper"]], "o", INK)
    found = prior["evidence"]
    if found is not None and len(found["priors"]) > 1:
        name = "emptiest boundary in U" if found["gap"] else "emptiest boundary in U (no gap)"
        rows.append((name, found["boundary"], found["boundary_interval"] if found["gap"] else None, "o", BLUE))
    if found is not None:
        rows.append(("density ratio of P", found["density_ratio"], found["density_ratio_interval"], "o", GREEN))
        rows.append(("best bin (BBE)", found["bbe"], None, "o", GREEN))
    rows.append(("used in training", prior["used_for_training"], None, "D", PURPLE))
    if prior["true_in_sample"] is not None:
        rows.append(("true share of sample", prior["true_in_sample"], None, "s", ORANGE))
    figure, axes = _axes(5.6, 0.9 + 0.26 * len(rows))
    for y, (_, value, bounds, marker, colour) in enumerate(rows):
        axes.plot([value], [y], marker, color=colour, markersize=5.5, clip_on=False)
        if bounds is not None:
            axes.plot(bounds, [y, y], color=colour, linewidth=2)
    if prior["true_in_sample"] is not None:
        axes.axvline(prior["true_in_sample"], color=ORANGE, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * max(v for row in rows for v in [row[1], *(row[2] or ())]))
    axes.set_xlabel("share of relevant images in the corpus")
    return figure, "Estimates of the class prior"


@_drawing
def valley_plot(found: EvidenceRecord, prior: PriorRecord) -> tuple[Figure, str]:
    """How empty U is at the boundary that each prior of the grid draws."""
    figure, axes = _axes(5.2, 3.2)
    points = [(p, e) for p, e in zip(found["priors"], found["emptiness"], strict=True) if e is not None]
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label="as full as the positive side")
    axes.plot(x, y, color=BLUE, marker="o", markersize=4)
    if found["gap"]:
        axes.axvspan(*found["boundary_interval"], color=BLUE, alpha=0.15, linewidth=0)
        axes.axvline(found["boundary"], color=BLUE, linewidth=1.2, label="emptiest boundary")
    if prior["true_in_sample"]:
        axes.axvline(prior["true_in_sample"], color=ORANGE, linewidth=1, linestyle=(0, (4, 2)), label="true share")
    axes.set(xscale="log", xlabel="prior", ylabel="density at the boundary")
    ticks = [v for v in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if not x or x[0] / 1.5 <= v <= x[-1] * 1.5]
    axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, min(max(y, default=1.0), 4.0) * 1.05)
    _legend(figure, 2)
    return figure, "Density of the corpus at the boundary over the prior"


# -- training ---------------------------------------------------------------------------------------------------


@_drawing
def curves_plot(
    curves: dict[str, list[tuple[int, float]]], ylabel: str, *, chosen: int | None = None, points: bool = False
) -> tuple[Figure, str]:
    """Values over training steps, one line per name."""
    figure, axes = _axes(4.6, 3.0)
    for (name, points_of), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=False):
        steps, values = zip(*points_of, strict=True) if points_of else ((), ())
        axes.plot(steps, values, color=colour, marker="o" if points else None, markersize=4, label=name)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linestyle=(0, (4, 2)), linewidth=1.2, label=f"chosen: {chosen:,}")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(curves) > 1 or chosen is not None:
        _legend(figure, 2)
    return figure, f"{ylabel} over training steps"


# -- classes ----------------------------------------------------------------------------------------------------


@_drawing
def classes_plot(names: Sequence[str], counts: Sequence[float], weights: Sequence[float]) -> tuple[Figure, str]:
    """Selected images and class weight of each class, side by side."""
    named = len(names) <= MAX_NAMED_CLASSES
    figure = Figure(figsize=(7.4, 1.0 + 0.24 * len(names) if named else 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(names))
    for axes, values, colour, label in (
        (left, counts, BLUE, "selected images (by the teacher's label)"),
        (right, weights, PURPLE, "class weight in distillation"),
    ):
        if named:
            axes.barh(at, values, color=colour, height=0.7, alpha=0.85)
        else:  # one shape instead of a thousand
            edges = np.arange(len(names) + 1) - 0.5
            axes.stairs(values, edges, orientation="horizontal", fill=True, color=colour, alpha=0.85)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    right.axvline(1.0, color=INK, linestyle=(0, (4, 2)), linewidth=1)
    left.set_ylim(len(names) - 0.5, -0.5)
    if named:
        left.set_yticks(at, [shorten(name) for name in names])
    else:
        left.set_ylabel("class index")
    return figure, "Selected images and weight of each class"
