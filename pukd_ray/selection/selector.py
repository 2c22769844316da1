"""Stage `selector`: features of P and a sample of U, prior, cross-fit, final head; stops a run that would fail."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.labelled import LabelError, Labelled, index_labelled
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Pass, stream
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.timing import Span, Stopwatch, covered_seconds
from pukd_ray.selection.calibration import to_json
from pukd_ray.selection.features import ExtractFeatures, Features, WriteFeatures
from pukd_ray.selection.guards import (
    check_prior,
    check_sample,
    check_selection,
    check_teacher_agrees,
    fit_warnings,
)
from pukd_ray.selection.losses import LOSSES
from pukd_ray.selection.recipe import FittedSelector, fit_and_calibrate
from pukd_ray.selection.sampling import sample_corpus
from pukd_ray.selection.tasks import RayTasks
from pukd_ray.storage import write_bytes

PRIOR_FACTORS = (0.5, 2.0)  # of the sensitivity that the report shows, beside 1


def train_selector(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts. RunError where going on would waste the cluster's time."""
    folder, config = run.folder, run.config
    folder.delete_folder("selector")
    labelled = _index("positives", run)
    if labelled.classes and config.teacher.class_names is None:
        say("          label names: " + ", ".join(f"{i} = {name}" for i, name in enumerate(labelled.classes)))
    if labelled.left_out:
        say(f"          positives: {labelled.left_out:,} images with labels outside label_map are not used")
    if config.test is not None:  # wrong test labels should not surface after hours of training
        _index("test", run)
    sample = sample_corpus(run.units_of("corpus"), config.selector.sample, config.seed)
    files, errors, spans = _extract(run, [*labelled.requests, *sample])
    tasks, light = RayTasks.load(run, files)
    check_sample(config, len(light.p_labels), len(light.u_units), errors)
    agreement = check_teacher_agrees(light, config)

    fitted = fit_and_calibrate(tasks, config.selector, config.seed, lambda first: check_prior(config, first))

    share = float((fitted.final.u_logits > 0).mean())
    check_selection(config, share, fitted.fit.prior)
    warnings = fit_warnings(fitted.fit, share, fitted.fit.prior)
    if config.selector.prior == "auto":
        warnings = [*fitted.first.warnings, *warnings]
    for warning in warnings:
        say(f"          warning: {warning}")
    folder.write_json(
        "selector/prior.json", _prior(config, fitted, light, _sensitivity(tasks, fitted, light), warnings)
    )
    _write_selector(folder, config, fitted)
    folder.write_json("selector/meta.json", _meta(config, fitted, labelled, light, errors, agreement))
    return {
        "computing_seconds": round(covered_seconds([*spans, *tasks.spans]), 3),
        "n_positives": len(light.p_labels),
        "n_sample": len(light.u_units),
        "prior": round(fitted.fit.prior, 4),
        "steps": fitted.fit.steps,
        "selects": f"{share:.1%}",
    }


def _index(role: str, run: RunContext) -> Labelled:
    try:
        return index_labelled(role, run.units, sources_by_role(run.config)[role], run.config.teacher)
    except LabelError as error:
        raise RunError(str(error)) from error


def _extract(run: RunContext, requests: list[ReadRequest]) -> tuple[list[str], list[tuple[str, str, str]], list[Span]]:
    """(files of the feature cache, (role, image, error) of what could not be read, when workers were at work)."""
    config = run.config
    files: list[str] = []
    total = sum(request.count for request in requests)
    errors: list[tuple[str, str, str]] = []
    spans: list[Span] = []
    watch = Stopwatch()
    arguments = (config.teacher, run.weights, config.selector, config.seed)
    work = Pass("features", ExtractFeatures, arguments, WriteFeatures(run.folder))
    with progress("features", total, "images") as bar:
        for part in stream(run, work, requests):
            spans += part.spans
            for row in part.entries:
                files.append(row["file"])
                errors += [_split_error(e) for e in row["errors"]]
                bar.update(row["rows"])
    run.folder.write_json("selector/features.json", {"files": sorted(files), "images": total, "seconds": watch.seconds})
    return sorted(files), errors, spans


def _split_error(text: str) -> tuple[str, str, str]:
    role, rest = text.split("|", 1)
    image, error = rest.rsplit("|", 1)
    return role, image, error


def _sensitivity(tasks: RayTasks, fitted: FittedSelector, light: Features) -> list[dict[str, Any]]:
    """What the selector takes of the sample at half, one and two times the prior it was trained with."""
    training = fitted.training
    if not LOSSES[training.loss].needs_prior:
        return []
    factors = [f for f in PRIOR_FACTORS if f * training.prior < 1]
    tries = tasks.selected_by([replace(training, prior=factor * training.prior) for factor in factors])
    taken = {1.0: fitted.final.u_logits > 0, **dict(zip(factors, tries, strict=True))}
    classes = tasks.run.config.teacher.num_classes
    return [
        {
            "factor": factor,
            "prior": factor * training.prior,
            "share_selected": float(taken[factor].mean()),
            "per_class": np.bincount(light.u_teacher[taken[factor]], minlength=classes).tolist(),
        }
        for factor in sorted(taken)
    ]


# -- what the stage leaves --------------------------------------------------------------------------------------


def _prior(
    config: RunConfig,
    fitted: FittedSelector,
    light: Features,
    sensitivity: list[dict[str, Any]],
    warnings: list[str],
) -> dict[str, Any]:
    """`selector/prior.json`."""
    known = light.u_relevant >= 0
    return {
        "value": fitted.fit.prior,
        "lower": fitted.fit.prior_interval[0],
        "upper": fitted.fit.prior_interval[1],
        "source": "bbe" if config.selector.prior == "auto" else "config",
        "refined": fitted.fit.refined,
        "used_for_training": fitted.training.prior,
        "estimate": {k: v for k, v in asdict(fitted.first).items() if k != "bootstrap"},
        "sensitivity": sensitivity,
        "warnings": warnings,
        "true_in_sample": float(light.u_relevant[known].mean()) if known.any() else None,
    }


def _meta(
    config: RunConfig,
    fitted: FittedSelector,
    labelled: Labelled,
    light: Features,
    errors: list[tuple[str, str, str]],
    agreement: float,
) -> dict[str, Any]:
    """`selector/meta.json`."""
    fit, u_logits = fitted.fit, fitted.final.u_logits
    return {
        "classes": labelled.classes or config.teacher.class_names,
        "positives_per_class": labelled.class_counts(config.teacher.num_classes).tolist(),
        "positive_weights": {int(k): float(fit.p_weights[light.p_teacher == k][0]) for k in np.unique(light.p_teacher)},
        "n_positives": len(light.p_labels),
        "n_sample": len(light.u_units),
        "rejected_positives": {image: e for role, image, e in errors if role == "positives"},
        "rejected_sample": Counter(e.partition(":")[0] for role, _, e in errors if role == "corpus"),
        "teacher_agreement": agreement,
        "steps": fit.steps,
        "proxy_accuracy": fit.proxy_accuracy,
        "held_out_recall": fit.recall,
        "held_out_share": fit.selected_share,
        "share_selected": float((u_logits > 0).mean()),
        "share_above_half": float((fitted.calibration(u_logits) > 0.5).mean()),
        "calibration": asdict(fitted.calibration),
        "log_max_phi": fitted.final.log_max_phi,
    }


def _write_selector(folder: RunFolder, config: RunConfig, fitted: FittedSelector) -> None:
    """Network, course of training, calibration, and the held-out logits that estimates of a selection need."""
    final, fit = fitted.final, fitted.fit
    write_bytes(folder.fs, folder.path("selector/head.pt"), final.head)
    if final.trunk is not None:
        write_bytes(folder.fs, folder.path("selector/trunk.pt"), final.trunk)
    folder.write_json(
        "selector/training.json",
        {"loss": config.selector.loss, "risk": final.risk_curve, "proxy_accuracy": fit.proxy_curve},
    )
    folder.write_json("selector/calibration.json", to_json(fitted.calibration, fitted.bootstrap))
    folder.write_table(
        "selector/held_out.parquet",
        pa.table(
            {
                "role": ["positives"] * len(fit.p_logits) + ["corpus"] * len(fit.u_logits),
                "logit": pa.array(np.concatenate([fit.p_logits, fit.u_logits]), pa.float32()),
                "weight": pa.array(np.concatenate([fit.p_weights, np.ones(len(fit.u_logits))]), pa.float32()),
            }
        ),
    )
