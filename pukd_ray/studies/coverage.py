"""Do the 90 % intervals hold the truth, and is a biased P seen? Many small tasks of known truth answer.

A case is one value of each of `FACTORS`; some hundred of them fill that space evenly (a Latin hypercube). Each goes
through the shipped recipe, and then through the estimates of the stage `select`. Truth is only used to measure.
"""

from __future__ import annotations

import gzip
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from scipy.stats import qmc

from pukd_ray.config import SelectorConfig, TeacherConfig
from pukd_ray.demo.build import CLASSES, OTHER_CLASSES
from pukd_ray.demo.pools import Bank, Pool, available, draw_counts, draw_pool
from pukd_ray.networks.teacher import Teacher
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import use_threads
from pukd_ray.selection.crossfit import Groups
from pukd_ray.selection.features import as_half
from pukd_ray.selection.recipe import InProcess, conclude_prior, fit_and_calibrate
from pukd_ray.selection.training import Examples
from pukd_ray.selection.views import random_views
from pukd_ray.studies.mixtures import Sample, class_shares, draw_mixture
from pukd_ray.studies.pages import describe_machine
from pukd_ray.studies.selector import Cache, Source, extract, figures_of, verdict_figures

FASHION = "Fashion-MNIST"
FACTORS: Mapping[str, Sequence[Any]] = {
    "source": ("simulated", "simulated", FASHION),
    "prior": (0.002, 0.01, 0.05, 0.25, 0.6),
    "per class": (10, 20, 100),
    "classes": (5, 10, 100),
    "overlap": ("easy", "hard"),
    "bias": (0.0, 0.0, 0.7, 1.2),
    "mix": ("balanced", "Zipf"),
}
"""Values of each; one that is named twice has twice as many cases. Fashion-MNIST always has the teacher's 5 classes."""
CASES = 320
FIRST_SEED = 1_000
"""63 cases with lower seeds were looked at before the class mix was estimated with the prior: they served tuning."""
ROWS = 12_000  # of U; fewer of Fashion-MNIST where a kind has not as many images
UNITS = 25
SETTINGS: Mapping[str, Any] = {"steps": 300, "batch_size": 256, "lr": 0.003, "views": 4, "grid": 1}
"""What differs from the defaults of `selector`, to make hundreds of runs affordable."""
EASY = ("Sandal", "Sneaker", "Ankle boot")
"""Of Fashion-MNIST's classes that the teacher does not know, those that look like none that it knows."""
BIASES = (0.0, 0.7)
"""Of the test's own runs: the pool `hard`, P of 100 per class."""


@dataclass(frozen=True)
class Case:
    """One task."""

    source: str
    prior: float
    per_class: int
    classes: int
    overlap: str
    bias: float
    mix: str
    seed: int

    @property
    def key(self) -> str:
        """Its values in the order of `FACTORS`, then the seed."""
        return "/".join(map(str, astuple(self)))


def draw_cases(count: int = CASES, *, tuning: bool = False) -> list[Case]:
    """Cases in which every value of every factor comes equally often; in random order, so that any first part of them
    is spread evenly too. Those for tuning are others, with other seeds."""
    rng = np.random.default_rng(3 + tuning)
    points = qmc.LatinHypercube(len(FACTORS), optimization="random-cd", rng=rng).random(count)
    cases = []
    for number, point in enumerate(points):
        chosen: list[Any] = [values[int(x * len(values))] for x, values in zip(point, FACTORS.values(), strict=True)]
        case = Case(*[*chosen, FIRST_SEED + number + 10_000 * tuning])
        cases.append(replace(case, classes=len(CLASSES)) if case.source == FASHION else case)
    return cases


@dataclass(frozen=True)
class Photographs:
    """Fashion-MNIST and what the demo's teacher sees in it."""

    bank: Bank
    cache: Cache
    teacher: TeacherConfig
    weights: bytes

    @classmethod
    def load(cls, bank: Bank, teacher: TeacherConfig) -> Photographs:
        """Run the teacher over the bank."""
        weights = Path(teacher.weights).read_bytes()
        return cls(bank, extract(Source(bank, teacher, weights), SETTINGS["grid"]), teacher, weights)

    def sample(self, pool: Pool, seed: int) -> Sample:
        """What the recipe is given of a pool."""
        network = Teacher(self.teacher, self.weights, torch.device("cpu"), SETTINGS["grid"])
        images = self.bank.images[pool.positives, None]
        views = random_views(images, "crop_flip", SETTINGS["views"], pool.positives + seed)
        p = np.stack([as_half(network(views[:, v])[0].numpy()) for v in range(views.shape[1])], 1)
        classes, (last_tap, _) = self.cache.logits.argmax(1), network.extractor.last_tap
        u = self.cache.features[pool.corpus]
        return Sample(p, u, classes[pool.positives], classes[pool.corpus], pool.relevant, last_tap)


def draw_fashion(bank: Bank, case: Case, *, tuning: bool) -> Pool:
    """P and U of Fashion-MNIST; U has as many images as the kinds allow, up to ROWS."""
    others = OTHER_CLASSES if case.overlap == "hard" else EASY
    shares = dict(zip(CLASSES, case.prior * class_shares(len(CLASSES), case.mix), strict=True))
    shares |= dict.fromkeys(others, (1 - case.prior) / len(others))
    most = available(bank, tuning)
    rows = min(ROWS, *(int(most[kind] / share) for kind, share in shares.items()))
    counts = {kind: min(round(share * rows), most[kind]) for kind, share in shares.items()}
    rng = np.random.default_rng([case.seed, 5, tuning])
    return draw_counts(bank, counts, rng, seed=case.seed, per_class=case.per_class, tuning=tuning, bias=case.bias)


def draw_sample(case: Case, photographs: Photographs | None, *, tuning: bool) -> Sample:
    """The task of a case."""
    if case.source == FASHION:
        if photographs is None:
            raise ValueError(f"{case.key} needs {FASHION}")
        return photographs.sample(draw_fashion(photographs.bank, case, tuning=tuning), case.seed)
    return draw_mixture(
        np.random.default_rng([case.seed, 7]),
        rows=ROWS,
        prior=case.prior,
        classes=case.classes,
        per_class=case.per_class,
        overlap=case.overlap,
        mix=case.mix,
        bias=case.bias,
    )


def measure_case(
    sample: Sample, seed: int, settings: Mapping[str, Any] = SETTINGS, keep: Path | None = None
) -> dict[str, float]:
    """All figures of one task; what they are from is pickled into the file `keep`."""
    use_threads()
    began = time.process_time()
    executor, selector = _executor(sample, seed), SelectorConfig(**settings)
    fitted = fit_and_calibrate(executor, selector, seed)
    if keep is not None:
        groups, fit = executor.groups, fitted.fit
        kept = {
            "verdict": fitted.verdict,
            "training": fitted.training,
            "p_logits": fit.p_logits.astype(np.float16),
            "u_logits": fit.u_logits.astype(np.float16),
            "final_logits": fitted.final.u_logits.astype(np.float16),
            "p_classes": groups.p_classes.astype(np.uint8),
            "u_classes": groups.u_classes.astype(np.uint8),
            "relevant": sample.relevant,
        }
        keep.write_bytes(gzip.compress(pickle.dumps(kept)))
    return {**figures_of(fitted, sample.relevant), "seconds": time.process_time() - began}


def measure_test(sample: Sample, seed: int) -> dict[str, float]:
    """What is said of the prior and of a bias, no more."""
    use_threads()
    began = time.process_time()
    verdict = conclude_prior(_executor(sample, seed), SelectorConfig(**SETTINGS), seed)
    return {**verdict_figures(verdict, sample.relevant), "seconds": time.process_time() - began}


def _executor(sample: Sample, seed: int) -> InProcess:
    units = np.arange(len(sample.u)) * UNITS // len(sample.u)
    p, u = (x[:, -sample.last_tap :].astype(np.float32) for x in (sample.p[:, 0], sample.u))
    groups, _ = Groups(units, sample.p_classes, sample.u_classes).with_tails(p, u, sample.p_classes, seed)
    return InProcess(Examples(sample.p, sample.u), groups)


# -- many runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasRun:
    """One draw of `hard`, for the test of the assumption."""

    bias: float
    seed: int

    @property
    def key(self) -> str:
        """`test/bias/seed`."""
        return f"test/{self.bias}/{self.seed}"


def bias_runs(seeds: int, *, tuning: bool = False) -> list[BiasRun]:
    """`seeds` of each of BIASES."""
    return [BiasRun(bias, FIRST_SEED + seed + 10_000 * tuning) for seed in range(seeds) for bias in BIASES]


@ray.remote(num_cpus=1)
def _measure(
    run: Case | BiasRun, photographs: Photographs, tuning: bool, keep: Path | None
) -> tuple[str, dict[str, float]]:
    if isinstance(run, BiasRun):
        pool = draw_pool(photographs.bank, "hard", seed=run.seed, bias=run.bias, tuning=tuning)
        return run.key, measure_test(photographs.sample(pool, run.seed), run.seed)
    file = None if keep is None else keep / (run.key.replace("/", "_") + ".pickle.gz")
    return run.key, measure_case(draw_sample(run, photographs, tuning=tuning), run.seed, keep=file)


def run_study(
    file: Path,
    photographs: Photographs,
    runs: Sequence[Case | BiasRun],
    *,
    tuning: bool = False,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Make the runs that `file` (JSON) does not have yet, one on each CPU, adding each as it ends; return all of it."""
    study: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    study |= {"machine": describe_machine(), "tuning": tuning}
    missing = [run for run in runs if run.key not in study["runs"]]
    shared = ray.put(photographs)
    waiting = [_measure.remote(run, shared, tuning, keep) for run in missing]
    file.parent.mkdir(parents=True, exist_ok=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with progress("coverage", len(runs), "runs", len(runs) - len(missing)) as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            for key, figures in ray.get(done):
                study["runs"][key] = {name: round(value, 5) for name, value in figures.items()}
            unfinished = file.with_suffix(".part")  # what is cut off while it writes should not cost all runs
            unfinished.write_text(json.dumps(study, indent=1, sort_keys=True) + "\n")
            unfinished.replace(file)
            bar.update(len(done))
    return study
