"""The selector on all of P, trained by a group of Ray Train workers."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import remote_progress
from pukd_ray.runtime.devices import Worker, use_threads
from pukd_ray.runtime.timing import Span
from pukd_ray.runtime.train_group import train_group
from pukd_ray.selection.features import Features, load_features
from pukd_ray.selection.labels import label_weights
from pukd_ray.selection.recipe import FinalFit
from pukd_ray.selection.training import Callbacks, Examples, Training, Trunk, fit_selector, seen_by

LOG_EVERY = 20


def load_examples(
    folder: RunFolder, files: list[str], config: RunConfig, weights: Shared
) -> tuple[Examples, Trunk | None, Features]:
    """(features, the trunk if it is fine-tuned, what else the feature cache says, without the features)."""
    features = load_features(folder, files)
    known, shares, trunk = None, None, None
    if features.known is not None and len(features.known):
        known, weight = features.known, label_weights(folder)[features.known_rows]
        shares = weight / weight.sum() if weight.any() else None
    if features.p_pixels is not None and features.u_pixels is not None:
        t = config.teacher
        shape = (t.channels, t.input_size, t.input_size)
        p, u = features.p_pixels, features.u_pixels
        seen = None if known is None or features.known_pixels is None else features.known_pixels.reshape(-1, *shape)
        pixels = Examples(p.reshape(*p.shape[:2], *shape), u.reshape(-1, *shape), seen, shares)
        trunk = Trunk(t, weights.get(), config.selector.grid, pixels)
    rest = replace(
        features, p=features.p[:0], u=features.u[:0], known=None, p_pixels=None, u_pixels=None, known_pixels=None
    )
    return Examples(features.p, features.u, known, shares), trunk, rest


def fit_on_group(run: RunContext, files: list[str], training: Training, take: float | None) -> tuple[FinalFit, Span]:
    """(the selector trained so on the feature cache `files`, which takes that share; when rank 0 was at work)."""
    with remote_progress("head") as counter:
        setup = {
            "folder": run.folder,
            "files": files,
            "config": run.config,
            "weights": run.weights,
            "training": training,
            "take": take,
            "counter": counter,
        }
        result = train_group(_train_loop, setup, run.folder, "selector", run.config.resources, run.cluster)
    return result["final"], result["span"]


def _train_loop(setup: dict[str, Any]) -> dict[str, Any] | None:
    began = time.time()
    use_threads()
    features, trunk, _ = load_examples(setup["folder"], setup["files"], setup["config"], setup["weights"])
    worker = Worker.current(setup["config"].resources.precision)
    features = features.on(worker)
    training: Training = setup["training"]
    risk_curve: list[tuple[int, float]] = []

    def log(step: int, risk: float) -> None:
        if worker.rank == 0 and (step % LOG_EVERY == 0 or step == training.steps):
            risk_curve.append((step, risk))
            setup["counter"].set.remote(step, training.steps, "selector", risk)

    network = fit_selector(features, training, trunk, Callbacks(on_step=log), worker)
    if worker.rank:
        return None
    final = FinalFit.of(network, seen_by(features, trunk), training, setup["take"], worker.device, risk_curve)
    return {"final": final, "span": (began, time.time())}
