"""Stage `selector`: features of P and a sample of U, prior, cross-fit, final head; stops a run that would fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.labelled import LabelError, Labelled, index_labelled
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Pass, stream
from pukd_ray.errors import RunError
from pukd_ray.networks.selector import PixelSelector, SelectorHead
from pukd_ray.networks.teacher import dump_state
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import progress, remote_progress, say
from pukd_ray.runtime.devices import Worker, use_threads
from pukd_ray.runtime.timing import Span, Stopwatch, covered_seconds
from pukd_ray.runtime.train_group import train_group
from pukd_ray.selection.calibration import carry_over, rescale_logits, to_json
from pukd_ray.selection.crossfit import (
    FOLDS,
    FitReport,
    Groups,
    HeldOut,
    PriorReport,
    assess_fit,
    estimate_prior,
    final_training,
    fit_fold,
    pu_training,
    scorer_training,
)
from pukd_ray.selection.features import ExtractFeatures, Features, WriteFeatures, load_features
from pukd_ray.selection.rules import uses_selector
from pukd_ray.selection.sampling import sample_corpus
from pukd_ray.selection.training import Examples, Hooks, Training, Trunk, fit_selector, log_max_phi, logits_of, seen_by

MIN_POSITIVES = 10
MIN_SAMPLE = 100
MIN_PRIOR = 0.005  # below, held-out scores of U show next to nothing that looks like P
MIN_SHARE_OF_PRIOR = 0.2  # the head selects next to nothing: the clamp won (method sheet 1.8)
MAX_SHARE = 0.95
LOG_EVERY = 20
PRIOR_FACTORS = (0.5, 2.0)  # of the sensitivity that the report shows, beside 1


@ray.remote(num_cpus=0.5, num_returns=3)
def _load_features(folder: RunFolder, files: list[str], config: RunConfig, weights: Shared) -> tuple[Any, ...]:
    """(examples, trunk or None, the features' labels without the features)."""
    features = load_features(folder, files)
    light = replace(features, p=features.p[:0], u=features.u[:0], p_pixels=None, u_pixels=None)
    return Examples(features.p, features.u), _trunk(features, config, weights), light


def _trunk(features: Features, config: RunConfig, weights: Shared) -> Trunk | None:
    if features.p_pixels is None or features.u_pixels is None:
        return None
    t = config.teacher
    shape = (t.channels, t.input_size, t.input_size)
    pixels = Examples(
        features.p_pixels.reshape(*features.p_pixels.shape[:2], *shape), features.u_pixels.reshape(-1, *shape)
    )
    return Trunk(t, weights.get(), config.selector.grid, pixels)


@ray.remote(num_cpus=1)
def _fit_fold(features: Examples, trunk: Trunk | None, fold: int, training: Training) -> HeldOut:
    use_threads()
    return fit_fold(features, fold, training, trunk)


@ray.remote(num_cpus=0.5)
def _estimate_prior(groups: Groups, seed: int, *held_out: HeldOut) -> PriorReport:
    return estimate_prior(held_out, groups, seed)


@ray.remote(num_cpus=0.5)
def _assess_fit(
    groups: Groups, prior: float, training: Training, first: PriorReport | None, *held_out: HeldOut
) -> FitReport:
    return assess_fit(held_out, groups, prior, training, first)


@ray.remote(num_cpus=1)
def _selected_of_sample(features: Examples, trunk: Trunk | None, training: Training) -> tuple[np.ndarray, Span]:
    """Which of U a selector trained so would take, bool [n_u]."""
    began = time.time()
    use_threads()
    network = fit_selector(features, training, trunk)
    taken = logits_of(network, seen_by(features, trunk).u) > 0
    return taken, (began, time.time())


# -- final head -------------------------------------------------------------------------------------------------


def _train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train worker: the final selector on all of P."""
    began = time.time()
    use_threads()
    features = load_features(config["folder"], config["files"])
    trunk = _trunk(features, config["config"], config["weights"])
    worker = Worker.current()
    training: Training = config["training"]
    history: list[tuple[int, float]] = []

    def log(step: int, risk: float) -> None:
        if worker.rank == 0 and (step % LOG_EVERY == 0 or step == training.steps):
            history.append((step, risk))
            config["counter"].set.remote(step, training.steps, "selector", risk)

    examples = Examples(features.p, features.u)
    network = fit_selector(examples, training, trunk, Hooks(on_step=log), worker)
    if worker.rank:
        return None
    head = network if isinstance(network, SelectorHead) else network.head
    seen = seen_by(examples, trunk)
    logits = logits_of(network, seen.u, worker.device)
    scale = log_max_phi(network, seen, training, worker.device)
    return {
        "head": dump_state({**head.state_dict(), "log_max_phi": torch.tensor(scale, dtype=torch.float64)}),
        "trunk": dump_state(network.extractor.model.state_dict()) if isinstance(network, PixelSelector) else None,
        "log_max_phi": scale,
        "history": history,
        "u_logits": rescale_logits(logits, scale),
        "span": (began, time.time()),
    }


# -- the stage --------------------------------------------------------------------------------------------------


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
    features, trunk, light_ref = _load_features.remote(folder, files, config, run.weights)
    light: Features = ray.get(light_ref)
    n_p, n_u = len(light.p_labels), len(light.u_units)
    _check_sample(config, n_p, n_u, errors)
    agreement = _check_teacher_agrees(light, config)

    selector = config.selector
    groups = ray.put(Groups(light.u_units, light.p_teacher, light.u_teacher))
    scorer = scorer_training(selector, config.seed)
    # P against U needs no trunk of its own.
    scorers = _all_folds(lambda fold: _fit_fold.remote(features, None, fold, scorer), "P against U", spans)
    first: PriorReport = ray.get(_estimate_prior.remote(groups, config.seed, *scorers))
    _check_prior(config, first)
    estimated = selector.prior == "auto"
    prior, training = pu_training(selector, first, config.seed)
    fits = _all_folds(lambda fold: _fit_fold.remote(features, trunk, fold, training), selector.loss, spans)
    fit: FitReport = ray.get(_assess_fit.remote(groups, prior, training, first if estimated else None, *fits))
    final = final_training(training, fit)
    value = fit.prior
    result = _fit_final(run, files, final)
    spans.append(result["span"])
    u_logits = result["u_logits"]
    calibration, refits = carry_over(fit.calibration, fit.bootstrap, u_logits, value)
    share = float((u_logits > 0).mean())
    warnings = [*(first.warnings if estimated else ()), *_fit_warnings(fit, share, value)]
    _check_selection(config, share, value)
    for warning in warnings:
        say(f"          warning: {warning}")
    sensitivity = _try_priors(features, trunk, final, u_logits > 0, light, config, spans)
    known = light.u_relevant >= 0
    truth = float(light.u_relevant[known].mean()) if known.any() else None
    prior_json = {
        "value": value,
        "lower": fit.prior_interval[0],
        "upper": fit.prior_interval[1],
        "source": "bbe" if estimated else "config",
        "refined": fit.refined,
        "used_for_training": training.prior,
        "estimate": {k: v for k, v in asdict(first).items() if k != "bootstrap"},
        "sensitivity": sensitivity,
        "warnings": warnings,
        "true_in_sample": truth,
    }
    folder.write_json("selector/prior.json", prior_json)
    _write_head(folder, config, result, fit, to_json(calibration, refits))
    folder.write_json(
        "selector/meta.json",
        {
            "classes": labelled.classes or config.teacher.class_names,
            "positives_per_class": labelled.class_counts(config.teacher.num_classes).tolist(),
            "positive_weights": {
                int(k): float(fit.p_weights[light.p_teacher == k][0]) for k in np.unique(light.p_teacher)
            },
            "n_positives": n_p,
            "n_sample": n_u,
            "rejected_positives": {image: e for role, image, e in errors if role == "positives"},
            "rejected_sample": Counter(e.partition(":")[0] for role, _, e in errors if role == "corpus"),
            "teacher_agreement": agreement,
            "steps": fit.steps,
            "proxy_accuracy": fit.proxy_accuracy,
            "held_out_recall": fit.recall,
            "held_out_share": fit.selected_share,
            "share_selected": share,
            "share_above_half": float((calibration(u_logits) > 0.5).mean()),
            "calibration": asdict(calibration),
            "log_max_phi": result["log_max_phi"],
        },
    )
    return {
        "computing_seconds": round(covered_seconds(spans), 3),
        "n_positives": n_p,
        "n_sample": n_u,
        "prior": round(value, 4),
        "steps": fit.steps,
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


def _all_folds(start: Callable[[int], ray.ObjectRef], name: str, spans: list[Span]) -> list[ray.ObjectRef]:
    with progress(name, FOLDS, "folds") as bar:
        fits = waiting = [start(fold) for fold in range(FOLDS)]
        while waiting:
            done, waiting = ray.wait(waiting)
            spans += [fit.span for fit in ray.get(done)]
            bar.update(len(done))
    return fits


def _try_priors(
    features: ray.ObjectRef,
    trunk: ray.ObjectRef,
    final: Training,
    taken: np.ndarray,
    light: Features,
    config: RunConfig,
    spans: list[Span],
) -> list[dict[str, Any]]:
    """What the selector takes of the sample at half, one and two times the prior it was trained with."""
    if final.loss != "nnpu":
        return []
    factors = [f for f in PRIOR_FACTORS if f * final.prior < 1]
    with progress("sensitivity", len(factors), "priors") as bar:
        tries = [
            _selected_of_sample.remote(features, trunk, replace(final, prior=factor * final.prior))
            for factor in factors
        ]
        results = {1.0: taken}
        for factor, result in zip(factors, tries, strict=True):
            results[factor], span = ray.get(result)
            spans.append(span)
            bar.update(1)
    return [
        {
            "factor": factor,
            "prior": factor * final.prior,
            "share_selected": float(results[factor].mean()),
            "per_class": np.bincount(light.u_teacher[results[factor]], minlength=config.teacher.num_classes).tolist(),
        }
        for factor in sorted(results)
    ]


def _fit_final(run: RunContext, files: list[str], training: Training) -> dict[str, Any]:
    with remote_progress("head") as counter:
        setup = {
            "folder": run.folder,
            "files": files,
            "config": run.config,
            "weights": run.weights,
            "training": training,
            "counter": counter,
        }
        return train_group(_train_loop, setup, run.folder, "selector", run.config.resources, run.cluster)


def _write_head(
    folder: RunFolder, config: RunConfig, result: dict[str, Any], fit: FitReport, calibration: dict[str, Any]
) -> None:
    from pukd_ray.storage import write_bytes

    write_bytes(folder.fs, folder.path("selector/head.pt"), result["head"])
    if result["trunk"] is not None:
        write_bytes(folder.fs, folder.path("selector/trunk.pt"), result["trunk"])
    folder.write_json(
        "selector/training.json",
        {"loss": config.selector.loss, "risk": result["history"], "proxy_accuracy": fit.proxy_curve},
    )
    folder.write_json("selector/calibration.json", calibration)
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


# -- what stops a run -------------------------------------------------------------------------------------------


def _check_sample(config: RunConfig, n_p: int, n_u: int, errors: list[tuple[str, str, str]]) -> None:
    bad_p = [(image, error) for role, image, error in errors if role == "positives"]
    for image, error in bad_p[:10]:
        say(f"          positives: {image} is not used: {error}")
    if len(bad_p) > 10:
        say(f"          positives: {len(bad_p) - 10} more are not used; see selector/meta.json")
    if n_p < MIN_POSITIVES:
        raise RunError(
            f"positives: {n_p} readable images ({len(bad_p)} unreadable), at least {MIN_POSITIVES} are needed: "
            "add images to P"
        )
    reasons = Counter(error.partition(":")[0] for role, _, error in errors if role == "corpus")
    rejected = sum(reasons.values())
    if n_u + rejected >= MIN_SAMPLE and rejected > config.score.max_rejected * (n_u + rejected):
        what = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(3))
        raise RunError(
            f"corpus: {rejected} of {n_u + rejected} sampled images are unreadable ({what}), more than "
            f"score.max_rejected = {config.score.max_rejected:g}: check corpus.uri, corpus.image_column and the files, "
            "or raise it"
        )
    if n_u < MIN_POSITIVES:
        raise RunError(f"corpus: only {n_u} readable images: check corpus.uri")


def _check_teacher_agrees(light: Features, config: RunConfig) -> float:
    """P's labels must be those that the teacher gives; shifted labels or wrong preprocessing show here."""
    classes = config.teacher.num_classes
    labels, teacher = light.p_labels, light.p_teacher
    agreement = float((labels == teacher).mean())
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        say(
            f"          warning: positives has no image of {len(missing)} of {classes} classes ({shown}): "
            "images of these will hardly be selected"
        )
    shifts = (
        [float(((labels + s) % classes == teacher).mean()) for s in range(classes)] if classes <= 1000 else [agreement]
    )
    best = int(np.argmax(shifts))
    if best and shifts[best] > agreement + 0.2:
        raise RunError(
            f"positives: the teacher agrees with only {agreement:.0%} of the labels, but with {shifts[best]:.0%} of "
            f"them shifted by {best if best <= classes // 2 else best - classes:+d}: they are not teacher "
            "indices; use positives.label_map, or names with teacher.classes"
        )
    if agreement < min(0.5, 2 / classes):
        raise RunError(
            f"positives: the teacher agrees with only {agreement:.0%} of the labels (chance: {1 / classes:.0%}): "
            "check the labels, teacher.weights, and teacher.mean, std, channels and resize"
        )
    if agreement < 0.7:
        say(f"          warning: the teacher agrees with only {agreement:.0%} of P's labels")
    return agreement


def _check_prior(config: RunConfig, prior: PriorReport) -> None:
    if not uses_selector(config.selection.rule) or config.selector.prior != "auto":
        return
    if prior.value < MIN_PRIOR:
        raise RunError(
            f"corpus: next to nothing in the sample looks like P (estimated prior {prior.value:.4f}, at most "
            f"{prior.upper:.4f}): check that corpus and positives show the same things, or set selector.prior if you "
            "know that relevant images are there"
        )


def _fit_warnings(fit: FitReport, share: float, prior: float) -> list[str]:
    warnings = []
    if not 0.6 <= share / prior <= 1.4:
        warnings.append(
            f"the selector takes {share:.1%} of the sample where the prior says {prior:.1%}: set selector.prior if you "
            "know it, or use selection.rule precision or budget"
        )
    if fit.recall < 0.5:
        warnings.append(
            f"only {fit.recall:.0%} of held-out positives are recognised: P may be too small or too varied; add images"
        )
    if fit.calibration.at_bound:
        warnings.append(
            "P scores higher than anything in the corpus: probabilities are too extreme; label some corpus images and "
            "set selector.prior"
        )
    return warnings


def _check_selection(config: RunConfig, share: float, prior: float) -> None:
    if not uses_selector(config.selection.rule):
        return
    if share < MIN_SHARE_OF_PRIOR * prior:
        raise RunError(
            f"corpus: the selector takes {share:.2%} of the sample where the prior is {prior:.2%}: nothing to train a "
            "student on; set selector.prior higher, or add images to P"
        )
    if share > MAX_SHARE:
        raise RunError(
            f"corpus: the selector takes {share:.0%} of the sample: it tells nothing apart; set selector.prior lower, "
            "or distil from the whole corpus by selection.rule random"
        )
