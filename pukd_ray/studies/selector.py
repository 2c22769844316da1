"""How good selectors are on the pools of `pukd_ray.demo.pools`, with and without parts of the method.

A run is one pool, seed and setting: the recipe of the stage `selector`, in one process and on features that were
extracted once, and the estimates of the stage `select`. Truth is only used to measure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from pukd_ray.config import SelectorConfig, TeacherConfig
from pukd_ray.demo.pools import MEASURED, Bank, Pool, draw_pool
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import Teacher, teacher_opinion
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import ALONE, Worker, assigned_device, use_threads
from pukd_ray.selection.crossfit import FOLDS, Groups
from pukd_ray.selection.cuts import Scores, precision_count
from pukd_ray.selection.features import as_half
from pukd_ray.selection.histogram import bin_edges, bin_scores, estimate_selection
from pukd_ray.selection.labels import stand_by
from pukd_ray.selection.recipe import FittedSelector, InProcess, fit_and_calibrate
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.training import Examples, Trunk
from pukd_ray.selection.verdict import GIVEN, Verdict
from pukd_ray.selection.views import random_views
from pukd_ray.studies.audited import TrueLabels, label_by_truth
from pukd_ray.studies.cifar import POOL as CIFAR
from pukd_ray.studies.cifar import draw_cifar
from pukd_ray.studies.pages import describe_machine

UNIT_ROWS = 800  # rows that the bootstrap draws together, as a unit of the corpus
TARGET_PRECISION = 0.8
RIVALS = ("knn", "rmds", "linear_probe", "teacher_confidence", "entropy", "energy", "max_logit")
"""Rules whose average precision is measured beside the selector's."""
PENALTY = 1e3  # of the supervised model
TRUST = {"high": 2.0, "low": 1.0, "none": 0.0}
"""As figures."""


@dataclass(frozen=True)
class Setting:
    """What a run changes of the defaults."""

    selector: Mapping[str, Any] = field(default_factory=dict)
    """Config keys of `selector`."""
    prior_factor: float | None = None
    """The true prior times this instead of an estimate."""
    per_class: int = 100
    taps: tuple[str, ...] | None = None
    bias: float = 0.0
    """P is drawn from each class with probability proportional to exp(bias * standardised mean pixel)."""
    labels: int = 0
    """Images of an audit whose labels serve a second selector, the one that is measured, on all other images."""


SETTINGS: dict[str, Setting] = {
    "default": Setting(),
    "trunk: finetune": Setting({"trunk": "finetune"}),
    "prior: true": Setting(prior_factor=1.0),
    "prior: half": Setting(prior_factor=0.5),
    "prior: double": Setting(prior_factor=2.0),
    "loss: vpu": Setting({"loss": "vpu"}),
    "loss: naive": Setting({"loss": "naive"}),
    "batches: plain": Setting({"batches": "plain"}),
    "50 per class": Setting(per_class=50),
    "20 per class": Setting(per_class=20),
    "taps: last": Setting(taps=("relu4",)),
    "grid: 1": Setting({"grid": 1}),
    "views: 1": Setting({"views": 1}),
    "blend: false": Setting({"blend": False}),
}
BIASED: dict[str, Setting] = {
    "P biased, 0.7": Setting(bias=0.7),
    "P biased, 1.2": Setting(bias=1.2),
    "P biased, 0.7, prior: true": Setting(bias=0.7, prior_factor=1.0),
    "P biased, 1.2, prior: true": Setting(bias=1.2, prior_factor=1.0),
}
"""P as a biased sample, and what a selector that is told the prior makes of it."""
AUDITED: dict[str, Setting] = {
    "300 labels": Setting(labels=300),
    "P biased, 0.7, 300 labels": Setting(bias=0.7, labels=300),
    "P biased, 1.2, 300 labels": Setting(bias=1.2, labels=300),
}
"""What `selector.prior: audit` makes of them; not on the page."""
ALL_SETTINGS = SETTINGS | BIASED | AUDITED


@dataclass(frozen=True)
class Source:
    """What pools are drawn from, and the teacher that knows part of it."""

    bank: Bank
    teacher: TeacherConfig
    weights: bytes

    def draw(self, pool: str, setting: Setting, seed: int, *, tuning: bool) -> Pool:
        """P and the corpus of a run."""
        if pool == CIFAR:
            return draw_cifar(self.bank, seed=seed, per_class=setting.per_class, tuning=tuning)
        return draw_pool(self.bank, pool, seed=seed, per_class=setting.per_class, tuning=tuning, bias=setting.bias)

    def pixels(self, rows: np.ndarray | slice) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        images = self.bank.images[rows]
        return images if images.ndim == 4 else images[:, None]


@dataclass(frozen=True)
class Cache:
    """What the teacher makes of the whole bank, for one choice of taps and grid."""

    features: np.ndarray
    """float16 [N, C]."""
    last_tap: np.ndarray
    """float16 [N, C'], averaged over its grid cells."""
    logits: np.ndarray
    """float32 [N, K]."""
    cpu_seconds_per_image: float


def extract(source: Source, grid: int | str, rows: np.ndarray | slice = slice(None)) -> Cache:
    """Run the teacher over images of the bank, in this process."""
    network = Teacher(source.teacher, source.weights, torch.device("cpu"), grid)  # type: ignore[arg-type]
    pixels = source.pixels(rows)
    began = time.process_time()
    parts = [network(pixels[i : i + 512]) for i in range(0, len(pixels), 512)]
    seconds = time.process_time() - began
    features = np.concatenate([as_half(f.numpy()) for f, _ in parts])
    last_tap = np.concatenate([as_half(network.last_tap(f).numpy()) for f, _ in parts])
    return Cache(features, last_tap, torch.cat([z for _, z in parts]).numpy(), seconds / len(pixels))


def measure(
    source: Source,
    cache: Cache,
    pool_name: str,
    seed: int,
    setting: Setting,
    base: Mapping[str, Any],
    *,
    tuning: bool = False,
    worker: Worker = ALONE,
) -> dict[str, float]:
    """One run, trained on the worker's device; `base` are config keys of `selector` that all runs share."""
    use_threads()
    pool = source.draw(pool_name, setting, seed, tuning=tuning)
    true_prior = float(pool.relevant.mean())
    selector = SelectorConfig(**{**base, **setting.selector})
    if setting.prior_factor is not None:
        selector = replace(selector, prior=setting.prior_factor * true_prior)
    teacher = replace(source.teacher, taps=setting.taps)
    network = Teacher(teacher, source.weights, torch.device("cpu"), selector.grid)
    classes, u_features = cache.logits.argmax(1), cache.features[pool.corpus]

    def views_of(p_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, features) of P at these rows of the bank."""
        views = random_views(source.pixels(p_rows), selector.augment, selector.views, p_rows + seed)
        return views, np.stack([as_half(network(views[:, v])[0].numpy()) for v in range(views.shape[1])], 1)

    def executor(
        views: np.ndarray, p: np.ndarray, p_rows: np.ndarray, p_labels: np.ndarray, labels: TrueLabels | None = None
    ) -> InProcess:
        trunk, known, p_weights = None, None, None
        if selector.trunk == "finetune":
            trunk = Trunk(teacher, source.weights, selector.grid, Examples(views, source.pixels(pool.corpus)))
        if labels is not None:
            known, p_weights = labels.of_irrelevant(u_features), stand_by(labels.of_relevant(len(p_rows)))
        units = np.arange(len(pool.corpus)) // UNIT_ROWS
        groups = Groups(units, classes[p_rows], classes[pool.corpus], p_weights)
        if selector.blend:
            p_tap, u_tap = (cache.last_tap[rows].astype(np.float32) for rows in (p_rows, pool.corpus))
            groups, _ = groups.with_tails(p_tap, u_tap, p_labels, seed)
        return InProcess(Examples(p, u_features, *(known or ())), groups, trunk, worker)

    seen = views_of(pool.positives)
    began = time.process_time()
    fitted = fit_and_calibrate(executor(*seen, pool.positives, pool.labels), selector, seed)
    fit_seconds = time.process_time() - began
    judged: dict[str, float] = {}
    if setting.labels:
        logits = fitted.final.u_logits
        said = label_by_truth(logits, fitted.calibration(logits), pool.relevant, setting.labels, seed)
        joined = pool.corpus[said.rows[said.relevant]]
        p_rows, p_labels = np.r_[pool.positives, joined], np.r_[pool.labels, classes[joined]]
        again = executor(*views_of(p_rows), p_rows, p_labels, said)
        fitted = fit_and_calibrate(again, replace(selector, prior="audit"), seed, labels=said.prior)
        rest = np.setdiff1d(np.arange(len(pool.corpus)), said.rows)
        judged = _quality(fitted.final.u_logits[rest], pool.relevant[rest])

    return {
        **figures_of(fitted, pool.relevant),
        **judged,
        **rivals(cache, pool, fitted.final.u_logits),
        "feature_seconds": cache.cpu_seconds_per_image * (len(pool.corpus) + len(pool.positives) * selector.views),
        **({"fit_seconds": fit_seconds} if worker.on_cpu else {}),
    }


def figures_of(fitted: FittedSelector, relevant: np.ndarray) -> dict[str, float]:
    """What a selector and its estimates are worth on the sample that it was fitted on; truth bool [n_u]."""
    verdict, fit, calibration, logits = fitted.verdict, fitted.fit, fitted.calibration, fitted.final.u_logits
    binned = bin_scores(logits, logits > 0, bin_edges(np.r_[fit.p_logits, fit.u_logits]))
    estimated = estimate_selection(binned, fit.p_logits, fit.p_weights, calibration, fitted.bootstrap)
    figures = {
        **_quality(logits, relevant),
        **_at_target(logits, calibration(logits), relevant),
        **verdict_figures(verdict, relevant),
        "steps": fit.steps,
        "proxy_accuracy": fit.proxy_accuracy,
        "accuracy": float(((logits > 0) == relevant).mean()),
        "calibration_error": _calibration_error(calibration(logits), relevant),
    }
    figures["precision_estimated"], figures["recall_estimated"] = estimated["precision"], estimated["recall"]
    figures["precision_lower"], figures["precision_upper"] = estimated["precision_interval"]
    figures["recall_lower"], figures["recall_upper"] = estimated["recall_interval"]
    return figures


def verdict_figures(verdict: Verdict, relevant: np.ndarray) -> dict[str, float]:
    """The prior as it was concluded, and in truth."""
    return {
        "true_prior": float(relevant.mean()),
        "prior": verdict.prior,
        "prior_lower": verdict.lower,
        "prior_upper": verdict.upper,
        "prior_used": verdict.train,
        "trust": TRUST[verdict.trust],
        **_evidence(verdict),
    }


def _evidence(verdict: Verdict) -> dict[str, float]:
    """What the prior was concluded from; of one that was given what was looked at."""
    e = verdict.evidence
    assert e is not None
    grid = {
        "gap": float(e.boundary.inner),
        "prior_boundary": e.boundary.value,
        "boundary_lower": e.boundary.lower_bound,
        "boundary_upper": e.boundary.upper_bound,
    }
    return ({} if verdict.estimator in GIVEN else grid) | {
        "prior_ratio": e.ratio.value,
        "ratio_lower": float(np.quantile(e.ratio.draws, 0.05)),
        "ratio_upper": float(np.quantile(e.ratio.draws, 0.95)),
        "prior_bbe": e.bbe,
        "alike": e.alike,
        "auc": e.test.auc,
        "auc_error": e.test.error,
        "biased": float(e.biased),
    }


def rivals(cache: Cache, pool: Pool, logits: np.ndarray) -> dict[str, float]:
    """`ap_<rule>`: average precision of what each rival rule ranks by; `ap_supervised` that of a linear model of the
    same features that is told the truth, each image scored by one of five that it was not shown to."""
    p, u = (cache.last_tap[rows].astype(np.float32) for rows in (pool.positives, pool.corpus))
    teacher_logits = cache.logits[pool.corpus]
    opinion = {name: column.numpy() for name, column in teacher_opinion(torch.from_numpy(teacher_logits)).items()}
    label, confidence, entropy = (opinion[f"teacher_{name}"] for name in ("label", "confidence", "entropy"))
    of_rules = {rule.name: rule.scorer for rule in RULES.values() if rule.scorer}
    columns = {name: s.score(s.fit(p, u, pool.labels), u, teacher_logits) for name, s in of_rules.items()}
    no_ties = np.arange(len(u))
    columns["teacher_entropy"] = entropy
    scores = Scores(logits, logits, label, confidence, pool.relevant, no_ties, columns)
    return {
        **{f"ap_{name}": float(average_precision_score(pool.relevant, RULES[name].rank_by(scores))) for name in RIVALS},
        "ap_supervised": float(average_precision_score(pool.relevant, _supervised(cache, pool))),
    }


def _supervised(cache: Cache, pool: Pool) -> np.ndarray:
    """Held-out logits [n_u] of ridge regression on the truth."""
    from sklearn.linear_model import RidgeClassifier

    u = cache.features[pool.corpus].astype(np.float32)
    u = (u - u.mean(0)) / np.maximum(u.std(0), 1e-4)
    logits = np.zeros(len(u))
    for fold in range(FOLDS):
        out = np.arange(len(u)) % FOLDS == fold
        model = RidgeClassifier(PENALTY).fit(u[~out], pool.relevant[~out])
        logits[out] = model.decision_function(u[out])
    return logits


def _quality(logits: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    taken = logits > 0
    hits = float((taken & relevant).sum())
    precision, recall, _ = precision_recall_curve(relevant, logits)
    return {
        "ap": float(average_precision_score(relevant, logits)),
        "precision": hits / max(1, int(taken.sum())),
        "recall": hits / float(relevant.sum()),
        "f1": 2 * hits / float(taken.sum() + relevant.sum()),
        "best_f1": float((2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()),
        "recall_at_target": float(recall[precision >= TARGET_PRECISION].max()),
    }


def _at_target(logits: np.ndarray, probability: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """What `selection.rule: precision` takes."""
    order = np.argsort(-logits, kind="stable")
    count = precision_count(probability[order], np.ones(len(order)), TARGET_PRECISION)
    hits = float(relevant[order[:count]].sum())
    return {"target_precision": hits / max(1, count), "target_recall": hits / float(relevant.sum())}


def _calibration_error(probability: np.ndarray, relevant: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean |mean probability - share of relevant| over equal-width bins."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = np.bincount(index, probability, bins) - np.bincount(index, relevant, bins)
    return float(np.abs(gaps).sum() / len(probability))


# -- many runs --------------------------------------------------------------------------------------------------

QUICK = {"steps": 300, "batch_size": 512, "lr": 0.003}
"""The ablations' settings, far cheaper than the defaults, which have a table of their own."""
SLICE = 2048  # images that a task extracts
CIFAR_TOO = ("default", "blend: false", "prior: true")
RARE_TOO = ("default", "blend: false", "prior: true", "prior: half", "prior: double", "loss: naive")


@dataclass(frozen=True)
class Run:
    """What is run, and under which key its figures are kept."""

    base: str
    """`default` or `quick`."""
    pool: str
    setting: str
    seed: int

    @property
    def key(self) -> str:
        """`base/pool/setting/seed`."""
        return f"{self.base}/{self.pool}/{self.setting}/{self.seed}"


def describe(run: Run, figures: Mapping[str, float]) -> str:
    """One line for people."""
    f = figures
    trust = next(name for name, value in TRUST.items() if value == f["trust"])
    return (
        f"{run.key}: prior {f['prior']:.3f} [{f['prior_lower']:.3f}, {f['prior_upper']:.3f}], truth "
        f"{f['true_prior']:.3f}, trust {trust}; average precision {f['ap']:.4f}, precision {f['precision']:.3f} "
        f"(estimated {f['precision_estimated']:.3f}), recall {f['recall']:.3f} ({f['recall_estimated']:.3f})"
    )


def all_runs(seeds: int, cifar: bool) -> list[Run]:
    """The runs of docs/results.md, in the order of their worth, and of each kind the longest first."""
    pools = (CIFAR, *MEASURED) if cifar else MEASURED
    biased = [name for name, setting in BIASED.items() if setting.prior_factor is None]
    ablations = {"hard": SETTINGS, "rare": RARE_TOO, CIFAR: CIFAR_TOO}
    of_a_seed = (
        [("default", pool, "default") for pool in pools] + [("default", "hard", setting) for setting in biased],
        [("quick", pool, setting) for pool in ablations if pool in pools for setting in ablations[pool]],
        [("default", "hard", setting) for setting in BIASED if setting not in biased],
    )
    return [Run(*what, seed) for kind in of_a_seed for seed in range(seeds) for what in kind]


def quick_runs(seeds: int, cifar: bool) -> list[Run]:
    """Every pool, with the ablations' settings: to look at while something is changed."""
    runs = [replace(run, base="quick") for run in all_runs(seeds, cifar) if run.base == "default"]
    return [run for run in runs if not ALL_SETTINGS[run.setting].prior_factor]


@ray.remote(num_cpus=1)
def _extract(source: Source, grid: int | str, rows: np.ndarray) -> Cache:
    use_threads()
    return extract(source, grid, rows)


def audited_runs(seeds: int) -> list[Run]:
    """`hard` with labels of an audit, and without them, with the ablations' settings."""
    without = ("default", *(name for name, setting in BIASED.items() if not setting.prior_factor))
    return [Run("quick", "hard", setting, seed) for seed in range(seeds) for setting in (*without, *AUDITED)]


@ray.remote(num_cpus=1)
def _measure(source: Source, cache: Cache, run: Run, tuning: bool) -> tuple[str, dict[str, float]]:
    base = QUICK if run.base == "quick" else {}
    setting, worker = ALL_SETTINGS[run.setting], Worker(device=assigned_device(), precision="float32")
    return run.key, measure(source, cache, run.pool, run.seed, setting, base, tuning=tuning, worker=worker)


def run_study(file: Path, sources: Mapping[str, Source], runs: list[Run], *, tuning: bool = False) -> dict[str, Any]:
    """Make the runs that `file` (JSON) does not have yet, adding each as it ends; return all it then has.

    Args:
        file: is written after every run; a study that was interrupted goes on.
        sources: by pool.
        runs: in the order in which they are started.
        tuning: on pools that share no image with the final ones.

    Raises RunError if `file` has runs of the other kind.
    """
    study: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    if file.exists() and study.get("tuning", False) != tuning:
        kinds = ("the final pools", "the tuning pools")
        raise RunError(f"--output: {file} has runs on {kinds[not tuning]}: name another file for {kinds[tuning]}")
    study |= {"tuning": True} if tuning else {}
    default = SETTINGS["default"]
    study["pools"] = study.get("pools", {}) | {
        name: [
            sources[name].draw(name, default, seed, tuning=tuning).facts(sources[name].bank)
            for seed in range(1 + max(run.seed for run in runs))
        ]
        for name in dict.fromkeys(run.pool for run in runs)
    }
    study["machine"] = describe_machine()
    missing = [run for run in runs if run.key not in study["runs"]]
    needed = _needed_rows(sources, missing, tuning=tuning)
    # One copy in the object store of each source, and of its features for each choice of taps and grid.
    stored: dict[int, ray.ObjectRef] = {}
    caches: dict[tuple[int, str], ray.ObjectRef] = {}
    # A GPU is shared by as many runs as there are CPUs: their networks are small.
    cluster = ray.cluster_resources()
    run_one = _measure.options(num_gpus=min(1.0, cluster.get("GPU", 0) / cluster["CPU"]))
    waiting = []
    with progress("study", len(runs), "runs", len(runs) - len(missing)) as bar:
        for run in missing:
            source, setting = sources[run.pool], ALL_SETTINGS[run.setting]
            of_source = id(source)
            grid = setting.selector.get("grid", "auto")
            key = (of_source, f"{setting.taps}/{grid}")
            if of_source not in stored:
                stored[of_source] = ray.put(source)
            if key not in caches:
                tapped = ray.put(replace(source, teacher=replace(source.teacher, taps=setting.taps)))
                rows = needed[of_source]
                slices = [rows[i : i + SLICE] for i in range(0, len(rows), SLICE)]
                parts = [_extract.remote(tapped, grid, part) for part in slices]
                caches[key] = _join.remote(len(source.bank.images), rows, *parts)
            waiting.append(run_one.remote(stored[of_source], caches[key], run, tuning))
        while waiting:
            done, waiting = ray.wait(waiting)
            for name, figures in ray.get(done):
                study["runs"][name] = {figure: round(value, 5) for figure, value in figures.items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(study, indent=1, sort_keys=True) + "\n")
            bar.update(len(done))
    return study


def _needed_rows(sources: Mapping[str, Source], runs: Sequence[Run], *, tuning: bool) -> dict[int, np.ndarray]:
    """By id of the source the rows of its bank that the runs' pools have, ascending."""
    rows: dict[int, list[np.ndarray]] = {}
    for name, seed, bias in dict.fromkeys((run.pool, run.seed, ALL_SETTINGS[run.setting].bias) for run in runs):
        pool = sources[name].draw(name, Setting(bias=bias), seed, tuning=tuning)  # fewer positives are among these
        rows.setdefault(id(sources[name]), []).extend((pool.positives, pool.corpus))
    return {source: np.unique(np.concatenate(parts)) for source, parts in rows.items()}


@ray.remote(num_cpus=1)
def _join(count: int, rows: np.ndarray, *parts: Cache) -> Cache:
    """What the teacher makes of `rows` of a bank of `count` images; zeros for the rest, which no pool has."""

    def placed(name: str) -> np.ndarray:
        found = np.concatenate([getattr(part, name) for part in parts])
        whole = np.zeros((count, found.shape[1]), found.dtype)
        whole[rows] = found
        return whole

    seconds = float(np.mean([part.cpu_seconds_per_image for part in parts]))
    return Cache(placed("features"), placed("last_tap"), placed("logits"), seconds)
