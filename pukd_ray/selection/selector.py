"""Stage `selector`: features of P and a sample of U, prior, cross-fit, final head; stops a run that would fail."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.labelled import LabelError, Labelled, check_same_names, index_labelled
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Pass, stream
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import (
    PRIOR,
    SELECTOR,
    CalibrationRecord,
    Estimator,
    EvidenceRecord,
    PriorRecord,
    PriorSource,
    SelectorRecord,
)
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.timing import Span, Stopwatch, covered_seconds
from pukd_ray.selection.calibration import to_json
from pukd_ray.selection.drift import refer_to, save_reference
from pukd_ray.selection.features import LABELS, ExtractFeatures, Features, WriteFeatures
from pukd_ray.selection.guards import (
    check_prior,
    check_sample,
    check_selection,
    check_teacher_agrees,
    fit_warnings,
)
from pukd_ray.selection.labels import join, load_labels
from pukd_ray.selection.recipe import FittedSelector, fit_and_calibrate
from pukd_ray.selection.sampling import sample_corpus
from pukd_ray.selection.tasks import RayTasks
from pukd_ray.selection.verdict import Evidence


def train_selector(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts. RunError where going on would waste the cluster's time."""
    folder, config = run.folder, run.config
    watch = Stopwatch()
    folder.delete_folder("selector")
    labelled = _index("positives", run)
    if labelled.classes and config.teacher.class_names is None:
        say("          label names: " + ", ".join(f"{i} = {name}" for i, name in enumerate(labelled.classes)))
    if labelled.left_out:
        say(f"          positives: {labelled.left_out:,} images with labels outside label_map are not used")
    if config.test is not None:  # wrong test labels should not surface after hours of training
        try:
            check_same_names(labelled, _index("test", run))
        except LabelError as error:
            raise RunError(str(error)) from error
    units = run.units_of("corpus")
    sample = sample_corpus(units, config.selector.sample, config.seed)
    labels = load_labels(folder, sum(unit.rows for unit in units)) if config.selector.prior == "audit" else None
    reading, joined = run, list[ReadRequest]()
    if labels is not None:
        with_labels, joined = join(folder, config, labels)
        reading = replace(run, config=with_labels)
    files, errors, spans = _extract(reading, [*labelled.requests, *joined, *sample])
    tasks, light = RayTasks.load(run, files)
    check_sample(config, len(light.p_labels), len(light.u_units), errors)
    agreement = check_teacher_agrees(light, config)

    fitted = fit_and_calibrate(
        tasks,
        config.selector,
        config.seed,
        lambda verdict: check_prior(config, verdict),
        None if labels is None else labels.prior,
    )

    share, prior = float((fitted.final.u_logits > 0).mean()), fitted.verdict.prior
    check_selection(config, fitted.final.trained_share, prior)
    warnings = fit_warnings(fitted.fit, fitted.verdict)
    for warning in warnings:
        say(f"          warning: {warning}")
    folder.write_record(PRIOR, _prior(fitted, light, warnings))
    _write_selector(folder, config, fitted)
    asked = {request.unit.unit_id: request.count for request in sample}
    save_reference(folder, refer_to(units, asked, light.u_units, fitted.final.u_logits, fitted.calibration))
    folder.write_record(SELECTOR, _meta(config, fitted, labelled, light, errors, agreement))
    parts = {"features": folder.read_json("selector/features.json")["seconds"], **tasks.seconds}
    parts["evidence"] = watch.seconds - sum(parts.values())
    return {
        "computing_seconds": round(covered_seconds([*spans, *tasks.spans]), 3),
        "seconds": {part: round(seconds, 3) for part, seconds in parts.items()},
        "n_positives": int((light.p_units != LABELS).sum()),
        **({"n_labelled": int((light.p_units == LABELS).sum())} if labels is not None else {}),
        "n_sample": len(light.u_units),
        "prior": round(prior, 4),
        "trust": fitted.verdict.trust,
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
    arguments = (config.teacher, run.weights, config.selector, config.seed, config.resources.precision)
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


SOURCES: dict[Estimator, PriorSource] = {"given": "config", "audit": "audit"}
"""Of a prior by what it stands on; bbe of all that are estimated here."""


# -- what the stage leaves --------------------------------------------------------------------------------------


def _prior(fitted: FittedSelector, light: Features, warnings: list[str]) -> PriorRecord:
    """`selector/prior.json`."""
    known, verdict = light.u_relevant >= 0, fitted.verdict
    return {
        "value": verdict.prior,
        "lower": verdict.lower,
        "upper": verdict.upper,
        "source": SOURCES.get(verdict.estimator, "bbe"),
        "estimator": verdict.estimator,
        "trust": verdict.trust,
        "reasons": list(verdict.reasons),
        "used_for_training": fitted.training.prior,
        "evidence": None if verdict.evidence is None else _evidence(verdict.evidence),
        "warnings": warnings,
        "true_in_sample": float(light.u_relevant[known].mean()) if known.any() else None,
    }


def _evidence(found: Evidence) -> EvidenceRecord:
    boundary = found.boundary
    emptiness = [float(v) if np.isfinite(v) else None for v in boundary.emptiness]
    return {
        "priors": boundary.priors.tolist(),
        "emptiness": emptiness,
        "shares": [share for _, share in found.shares],
        "gap": boundary.inner,
        "boundary": boundary.value,
        "boundary_interval": [boundary.lower_bound, boundary.upper_bound],
        "density_ratio": found.ratio.value,
        "density_ratio_interval": [float(q) for q in np.quantile(found.ratio.draws, [0.05, 0.95])],
        "bbe": found.bbe,
        "alike": found.alike,
        "auc": found.test.auc,
        "auc_error": found.test.error,
    }


def _meta(
    config: RunConfig,
    fitted: FittedSelector,
    labelled: Labelled,
    light: Features,
    errors: list[tuple[str, str, str]],
    agreement: float,
) -> SelectorRecord:
    """`selector/meta.json`."""
    fit, u_logits = fitted.fit, fitted.final.u_logits
    names = labelled.classes or config.teacher.class_names
    return {
        "classes": None if names is None else list(names),
        "positives_per_class": labelled.class_counts(config.teacher.num_classes).tolist(),
        "positive_weights": {
            str(k): float(fit.p_weights[light.p_teacher == k].mean()) for k in np.unique(light.p_teacher)
        },
        "n_positives": int((light.p_units != LABELS).sum()),
        "n_labelled": int((light.p_units == LABELS).sum()),
        "n_known_negatives": len(light.known_rows),
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
        "calibration": cast(CalibrationRecord, asdict(fitted.calibration)),
        "log_max_phi": fitted.final.log_max_phi,
    }


def _write_selector(folder: RunFolder, config: RunConfig, fitted: FittedSelector) -> None:
    """Network, course of training, calibration, and the held-out logits that estimates of a selection need."""
    final, fit = fitted.final, fitted.fit
    folder.write_bytes("selector/head.pt", final.head)
    if final.trunk is not None:
        folder.write_bytes("selector/trunk.pt", final.trunk)
    if final.blend is not None:
        folder.write_json("selector/blend.json", asdict(final.blend))
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
