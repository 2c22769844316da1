"""Stage `report`: one self-contained page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from pukd_ray.config import RunConfig, SelectionConfig, to_plain
from pukd_ray.corpus.context import RunContext
from pukd_ray.report import plots
from pukd_ray.report.gallery import MAX_CLASSES, ClassGallery, Gallery, collect_gallery, png_uri, takes_highest
from pukd_ray.report.summary import NAMES, audited
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import (
    EXPORT,
    METRICS,
    PRIOR,
    SELECTION,
    SELECTOR,
    MetricsRecord,
    PriorRecord,
    SelectionRecord,
    SelectorRecord,
)
from pukd_ray.run.stages import STAGE_NAMES
from pukd_ray.runtime.templates import load_templates
from pukd_ray.selection.calibration import carry_over, from_json
from pukd_ray.selection.drift import describe_drift
from pukd_ray.selection.near import NEAR_FILE
from pukd_ray.selection.rules import RULES

REPORT = "report.html"
MISSING = "–"
MANY_CLASSES = 40  # a longer table is folded


def write_report(run: RunContext) -> dict[str, Any]:
    """Write `report.html`."""
    return {"page": REPORT, "pictures": write_page(run.folder, run.config)}


def write_page(folder: RunFolder, config: RunConfig) -> int:
    """The same for a finished run, on the cluster that is at hand; the number of pictures."""
    gallery = collect_gallery(folder, config)
    folder.write_text(REPORT, render_page(folder, config, gallery))
    return gallery.count


def render_page(folder: RunFolder, config: RunConfig, gallery: Gallery) -> str:
    """The page as HTML text that refers to nothing outside itself."""
    environment = load_templates("report")
    environment.filters |= {"share": share, "percent": percent, "number": number, "times": times}
    environment.filters |= {"seconds": duration, "track": track, "zip": zip, "quote": shlex.quote}
    return environment.get_template("page.html.j2").render(_content(folder, config, gallery))


# -- how figures read -------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    """Four digits, or a dash."""
    return MISSING if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """One digit after the point, or a dash."""
    return MISSING if value is None else f"{value:.1%}".replace("%", " %")


def number(value: float | None) -> str:
    """Thousands apart, or a dash."""
    return MISSING if value is None else f"{value:,}"


def times(value: float | None) -> str:
    """A factor with two digits, or a dash."""
    return MISSING if value is None else f"{value:.2f} times"


def duration(value: float) -> str:
    """Seconds as people say them."""
    if value < 100:
        return f"{value:.1f} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{value / 60:.1f} min"


def track(
    value: float, bounds: Sequence[float], truth: float | None, audit: tuple[float, Sequence[float]] | None = None
) -> Markup:
    """A line from 0 to 1 with the interval, the estimate and, where known, the truth and an audit with its interval."""

    def x(v: float) -> str:
        return f"{4 + 192 * min(max(v, 0.0), 1.0):.1f}"

    left, right = x(bounds[0]), x(bounds[1])
    parts = [
        '<svg class="track" viewBox="0 0 200 20" role="img" aria-label="estimate and interval on a line from 0 to 1">',
        '<line x1="4" x2="196" y1="10" y2="10" stroke="var(--grid)" stroke-width="2"/>',
        f'<line x1="{left}" x2="{right}" y1="10" y2="10" stroke="var(--blue)" stroke-width="6" opacity="0.5"/>',
        f'<circle cx="{x(value)}" cy="10" r="4" fill="var(--blue)"/>',
    ]
    if audit is not None:
        at, (left, right) = x(audit[0]), map(x, audit[1])
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="17" y2="17" stroke="var(--green)" stroke-width="4" opacity="0.6"/>'
            f'<circle cx="{at}" cy="17" r="2.5" fill="var(--green)"/>'
        )
    if truth is not None:
        parts.append(
            f'<line x1="{x(truth)}" x2="{x(truth)}" y1="1" y2="19" stroke="var(--orange)" stroke-width="2.5"/>'
        )
    return Markup("".join([*parts, "</svg>"]))


# -- what the page says -----------------------------------------------------------------------------------------


def _content(folder: RunFolder, config: RunConfig, gallery: Gallery) -> dict[str, Any]:
    metrics, prior = folder.read_record(METRICS), folder.read_record(PRIOR)
    meta, summary = folder.read_record(SELECTOR), folder.read_record(SELECTION)
    weights = folder.read_json("student/class_weights.json")
    names = class_names(meta["classes"], config.teacher.num_classes)
    markers = {stage: marker for stage in STAGE_NAMES if (marker := folder.marker(stage)) is not None}
    finished = max((m["finished"] for s, m in markers.items() if s != "report"), default=None)
    return {
        "name": config.name,
        "folder": folder.display,
        "finished": datetime.fromisoformat(finished).strftime("%Y-%m-%d %H:%M UTC") if finished else None,
        "environment": folder.read_json("environment.json") or {},
        "metrics": metrics,
        "networks": _networks(metrics),
        "num_classes": config.teacher.num_classes,
        "rule": config.selection.rule,
        "rule_text": explain_rule(config.selection),
        "uses_selector": RULES[config.selection.rule].uses_selector,
        "known_by_logit": RULES[config.selection.rule].known_by_logit,
        "quality": _quality(metrics, prior),
        "audit": metrics.get("audit"),
        "drift": metrics.get("drift"),
        "warnings": _warnings(config.selection, metrics, prior, meta, summary, names),
        "prior": prior,
        "meta": meta,
        "flow": _flow(metrics),
        "near": summary.get("near"),
        "near_pairs": _near_pairs(folder) if summary.get("near") else [],
        "classes": _classes(metrics, meta, summary, weights, names),
        "many_classes": config.teacher.num_classes > MANY_CLASSES,
        "arms": [NAMES[k] for k in NAMES if k in metrics],
        "export": folder.find_record(EXPORT),
        "effective_classes": weights["effective_classes"],
        "weights_kind": weights["kind"],
        "gallery": [_gallery(c, names, summary["class_counts"]) for c in gallery.classes],
        "gallery_count": gallery.count,
        "gallery_cut": config.teacher.num_classes > MAX_CLASSES,
        "ranked": gallery.ranked,
        "seconds": {stage: m["seconds"] for stage, m in markers.items() if stage != "report"},
        "config": yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True),
        **_plots(folder, config, gallery, prior, meta, summary, weights, names),
    }


def explain_rule(selection: SelectionConfig) -> str:
    """What the rule takes, with its numbers."""
    order = "those with the highest logits" if selection.order == "top" else "drawn at random"
    values = {"threshold": selection.threshold, "budget": selection.budget, "order": order}
    return RULES[selection.rule].text.format(**values, target_precision=selection.target_precision)


def class_names(classes: Any, count: int) -> list[str]:
    """Names in teacher order, or the indices where there are none."""
    if isinstance(classes, list | tuple) and len(classes) == count:
        return [str(name) for name in classes]
    return [f"class {k}" for k in range(count)]


def _networks(metrics: MetricsRecord) -> list[dict[str, Any]]:
    size = metrics["teacher"]["parameters"]
    return [
        {"name": name, **metrics[key], "factor": size / metrics[key]["parameters"]}
        for key, name in NAMES.items()
        if key in metrics
    ]


def _quality(metrics: MetricsRecord, prior: PriorRecord) -> list[dict[str, Any]]:
    estimated, audit = metrics["selection_estimated"], audited(metrics)
    rows = [
        ("precision", metrics["selection"]["precision"], estimated["precision"], estimated["precision_interval"]),
        ("recall", metrics["selection"]["recall"], estimated["recall"], estimated["recall_interval"]),
        (
            "prior",
            prior["true_in_sample"],
            prior["value"] if prior["trust"] != "none" else None,
            [prior["lower"], prior["upper"]] if prior["trust"] != "none" else None,
        ),
    ]
    return [
        {
            "name": name,
            "true": true,
            "estimated": value,
            "interval": bounds,
            "audit": audit.get(name),
            "inside": None if true is None or bounds is None else bounds[0] <= true <= bounds[1],
            "given": name == "prior" and prior["source"] == "config",
        }
        for name, true, value, bounds in rows
    ]


def _warnings(
    selection: SelectionConfig,
    metrics: MetricsRecord,
    prior: PriorRecord,
    meta: SelectorRecord,
    summary: SelectionRecord,
    names: list[str],
) -> list[str]:
    warnings = list(prior["warnings"])
    if meta["teacher_agreement"] < 0.7:
        warnings.append(
            f"The teacher agrees with only {meta['teacher_agreement']:.0%} of P's labels: check labels, "
            "teacher.weights and the preprocessing (teacher.mean, std, channels, resize)."
        )
    apart = [
        q["name"]
        for q in _quality(metrics, prior)
        if q["audit"] and q["interval"] and (q["audit"][1][1] < q["interval"][0] or q["audit"][1][0] > q["interval"][1])
    ]
    if apart:
        warnings.append(
            f"The audit contradicts the {' and the '.join(apart)} that the run assumes or estimates: believe the audit."
        )
    more = "give more of such images in P"
    rule = RULES[selection.rule]
    if "budget" in rule.needs and not rule.per_class and metrics["n_selected"] == selection.budget:
        more = "the budget went to other classes: raise selection.budget, or take rule quota, which shares it evenly"
    for counts, what in (
        (meta["positives_per_class"], "P has no image of {}: give some, images of such classes are hardly selected."),
        (summary["class_counts"], f"Nothing is selected for {{}}: look at the gallery; {more}."),
    ):
        missing = [name for name, count in zip(names, counts, strict=True) if not count]
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more classes" if len(missing) > 10 else "")
            warnings.append(what.format(shown))
    drift = metrics.get("drift")
    if drift is not None and drift["found"]:
        warnings.append(describe_drift(drift))
    if metrics["n_rejected"] > 0.05 * metrics["n_corpus"]:
        warnings.append(
            f"{metrics['n_rejected'] / metrics['n_corpus']:.0%} of the corpus could not be read: the reasons stand "
            "below, each image's own in the column error of scores/."
        )
    near = summary.get("near")
    if near is not None and near["positives_in_test"]:
        warnings.append(
            f"{near['positives_in_test']:,} pairs of an image of P and one of the test set look alike: the student is "
            "tested on what it learnt, and its accuracy is too high. They are shown below; mend positives or test."
        )
    if metrics.get("n_test_rejected"):
        warnings.append(f"{metrics['n_test_rejected']:,} test images could not be read and do not count: mend them.")
    rival = metrics.get("baseline_positives", {}).get("top1")
    top1 = metrics["student"]["top1"]
    if rival is not None and top1 is not None and top1 <= rival:
        warnings.append(
            f"The selection did not help: the student reaches {top1:.4f}, P alone {rival:.4f}. Train longer "
            "(distill.steps), or look at the selection's precision and at the gallery."
        )
    return warnings


def _flow(metrics: MetricsRecord) -> list[dict[str, Any]]:
    """What became of the corpus, each step with its share."""
    not_taken = metrics["n_scored"] - metrics["n_duplicates"] - metrics["n_selected"]
    rows = [
        ("corpus", metrics["n_corpus"], ""),
        ("unreadable", metrics["n_rejected"], "out"),
        ("scored", metrics["n_scored"], ""),
        ("copies dropped", metrics["n_duplicates"], "out"),
        ("not taken by the rule", not_taken, "out"),
        ("selected", metrics["n_selected"], "end"),
    ]
    total = max(metrics["n_corpus"], 1)
    return [{"name": name, "count": count, "share": count / total, "kind": kind} for name, count, kind in rows]


def _near_pairs(folder: RunFolder) -> list[dict[str, Any]]:
    """Pairs of near-copies to show, the worst first: of P and the test set, then of the corpus and both."""
    rows = folder.read_table(NEAR_FILE).to_pylist()
    return [
        {
            "bits": row["bits"],
            "images": [
                (row[one].partition("/")[0], row[one].partition("/")[2], png_uri(row[f"{one}_picture"]))
                for one in ("other", "image")
            ],
        }
        for row in rows
    ]


def _classes(
    metrics: MetricsRecord, meta: SelectorRecord, summary: SelectionRecord, weights: dict[str, Any], names: list[str]
) -> list[dict[str, Any]]:
    arms = [metrics[key] for key in NAMES if key in metrics]
    return [
        {
            "name": name,
            "positives": meta["positives_per_class"][k],
            "frequency": meta["positive_weights"].get(str(k)),  # none where the teacher sees no such image in P
            "selected": summary["class_counts"][k],
            "weight": weights["class_weights"][k],
            "accuracy": [arm["per_class"][k] if arm["per_class"] else None for arm in arms],
        }
        for k, name in enumerate(names)
    ]


def _gallery(shown: ClassGallery, names: list[str], counts: list[int]) -> dict[str, Any]:
    return {
        "name": names[shown.label],
        "selected": counts[shown.label],
        "kinds": [("top", shown.top), ("borderline", shown.borderline), ("rejected", shown.rejected)],
    }


# -- plots ------------------------------------------------------------------------------------------------------


def _plots(
    folder: RunFolder,
    config: RunConfig,
    gallery: Gallery,
    prior: PriorRecord,
    meta: SelectorRecord,
    summary: SelectionRecord,
    weights: dict[str, Any],
    names: list[str],
) -> dict[str, Any]:
    histogram = summary["histogram"]
    cuts = [c.cut for c in gallery.classes if summary["class_counts"][c.label]] or [0.0]
    label = _cut_label(config, cuts)
    saved = folder.read_json("selector/calibration.json")
    calibration, _ = from_json(saved)
    rows = None
    if histogram["relevant"] is not None and truth_is_complete(summary):
        rows = plots.reliability(histogram, calibration)
    training, distillation = folder.read_json("selector/training.json"), folder.read_json("student/training.json")
    losses = {NAMES.get(arm, arm): curve for arm, curve in distillation["loss"].items()}
    grid = prior["evidence"] if prior["evidence"] and len(prior["evidence"]["priors"]) > 1 else None
    return {
        "histograms": [plots.score_histogram(histogram, cuts, label, log=log) for log in (False, True)],
        "prior_plot": plots.prior_plot(prior),
        "valley_plot": plots.valley_plot(grid, prior) if grid else None,
        "calibration": saved,
        "calibration_plot": _calibration_plot(folder, saved, prior["value"]),
        "reliability": rows,
        "reliability_plot": plots.reliability_plot(rows) if rows else None,
        "calibration_error": plots.calibration_error(rows) if rows else None,
        "risk_plot": plots.curves_plot({training["loss"]: training["risk"]}, "selector risk"),
        "selector_loss": training["loss"],
        "proxy_plot": plots.curves_plot(
            {"proxy accuracy": training["proxy_accuracy"]}, "proxy accuracy", chosen=meta["steps"], points=True
        ),
        "loss_plot": plots.curves_plot(losses, "distillation loss"),
        "distillation": distillation,
        "classes_plot": plots.classes_plot(names, summary["class_counts"], weights["class_weights"]),
    }


def _cut_label(config: RunConfig, cuts: list[float]) -> str:
    if not takes_highest(config.selection):
        used = RULES[config.selection.rule].positives_only
        return "logit 0" + ("" if used else " (not used by this rule)")
    if max(cuts) - min(cuts) > 1e-6:
        return f"cuts of the classes, {min(cuts):.2f} to {max(cuts):.2f}"
    return f"cut at {cuts[0]:.2f}"


def truth_is_complete(summary: SelectionRecord) -> bool:
    """Whether all selected images have truth; the histogram cannot tell irrelevant from unknown ones."""
    truth = summary["truth"]
    if not truth or not truth["precision"]:
        return False
    return bool(round(truth["selected_relevant"] / truth["precision"]) == summary["n_selected"])


def _calibration_plot(folder: RunFolder, saved: dict[str, Any], prior: float) -> Markup:
    """On held-out logits the offset is that of the cross-fitted heads, which the saved one was moved from."""
    table = folder.read_table("selector/held_out.parquet")
    is_p = np.array(table.column("role").to_pylist()) == "positives"
    logits = table.column("logit").to_numpy().astype(np.float64)
    calibration, refits = carry_over(*from_json(saved), logits[~is_p], prior)
    return plots.calibration_plot(logits[is_p], logits[~is_p], calibration, refits)
