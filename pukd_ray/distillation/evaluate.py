"""Stage `evaluate`: accuracy of teacher and students on the test set, and `metrics.json`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import pyarrow as pa

from pukd_ray.audit.record import summarise_audit
from pukd_ray.config import TeacherConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Pass, TimedActor, stream
from pukd_ray.networks.actor import pixel_rows
from pukd_ray.run.records import METRICS, PRIOR, SELECTION, SELECTOR, MetricsRecord, NetworkRecord
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import BatchRunner, assigned_device, set_up, use_threads
from pukd_ray.runtime.metrics import record
from pukd_ray.runtime.timing import Span, covered_seconds
from pukd_ray.selection.chunks import chunk_markers
from pukd_ray.selection.drift import drift_of_chunks, load_reference, trust_with

if TYPE_CHECKING:
    from torch import Tensor

FURTHER: tuple[Literal["student_last", "baseline_positives"], ...] = ("student_last", "baseline_positives")
"""Students that a run trains beside the one that it is for, if its config says so."""


class Accuracy(TypedDict):
    """Of a network on the test set, 0 to 1."""

    top1: float
    top5: float
    per_class: list[float | None]
    """Top-1; None of a class without images."""


class CountCorrect(TimedActor):
    """Runs networks on labelled, decoded rows and counts per class: images, top-1 and top-5 hits.

    In float32 also on accelerators: that is what who loads a student computes in.
    """

    def __init__(self, teacher: TeacherConfig, networks: dict[str, tuple[str, Shared]]) -> None:
        from pukd_ray.networks.teacher import Normalise, load_network

        use_threads()
        device = assigned_device()
        set_up(device, "float32")
        self._teacher = teacher
        self._spec = pixel_spec(teacher)
        self._normalise = Normalise(teacher).to(device)
        self._networks = {
            name: load_network(arch, teacher, weights.get(), device, what=name)
            for name, (arch, weights) in networks.items()
        }
        self._best = BatchRunner(self._best_classes, device)

    def _best_classes(self, pixels: Tensor) -> dict[str, Tensor]:
        """By network its up to five likeliest classes, int64 [b, 5], best first."""
        x, count = self._normalise(pixels), min(5, self._teacher.num_classes)
        return {name: network(x).topk(count, dim=1).indices for name, network in self._networks.items()}

    def work(self, table: pa.Table) -> pa.Table:
        """Decoded rows -> one row of counts."""
        readable = table.column("error").is_null().to_numpy(zero_copy_only=False)
        labels = np.array([int(v) for v in table.column("label").to_pylist()])[readable]
        classes = self._teacher.num_classes
        counts = {"images": np.bincount(labels, minlength=classes).tolist()}
        if len(labels):
            for name, order in self._best(pixel_rows(table.column("pixels"), self._spec)).items():
                hits = order == labels[:, None]
                counts[f"{name}/top1"] = np.bincount(labels[hits[:, 0]], minlength=classes).tolist()
                counts[f"{name}/top5"] = np.bincount(labels[hits.any(1)], minlength=classes).tolist()
        return pa.table({"rows": [table.num_rows], "counts": [json.dumps(counts)]})


def _as_is(table: pa.Table) -> pa.Table:
    return table


def measure_accuracy(
    run: RunContext, networks: dict[str, tuple[str, Shared]]
) -> tuple[dict[str, Accuracy], int, list[Span]]:
    """Measure networks, {name: (arch, weights)}, on the test set.

    Returns:
        ({name: its accuracy}, unreadable test images, when workers were at work).
    """
    config = run.config
    labelled = index_labelled("test", run.units, sources_by_role(config)["test"], config.teacher)
    totals: dict[str, np.ndarray] = {}
    rows = 0
    spans: list[Span] = []
    work = Pass("evaluate", CountCorrect, (config.teacher, networks), _as_is)
    with progress("evaluate", labelled.count, "images") as bar:
        for part in stream(run, work, labelled.requests):
            spans += part.spans
            for entry in part.entries:
                for name, counts in json.loads(entry["counts"]).items():
                    totals[name] = totals.get(name, 0) + np.array(counts)
                rows += entry["rows"]
                bar.update(entry["rows"])
    images = totals["images"]
    accuracy: dict[str, Accuracy] = {
        name: {
            "top1": float(totals[f"{name}/top1"].sum() / images.sum()),
            "top5": float(totals[f"{name}/top5"].sum() / images.sum()),
            "per_class": [float(h / n) if n else None for h, n in zip(totals[f"{name}/top1"], images, strict=True)],
        }
        for name in networks
    }
    for name, figures in accuracy.items():
        record("top1", figures["top1"], network=name)
    return accuracy, rows - int(images.sum()), spans


def evaluate_run(run: RunContext) -> dict[str, Any]:
    """Run the stage and write `metrics.json`; without a test set accuracies are null."""
    from pukd_ray.networks.teacher import new_network
    from pukd_ray.networks.zoo import count_parameters

    folder, config = run.folder, run.config
    networks = {"teacher": (config.teacher.arch, run.weights)}
    for arm in ("student", *FURTHER):
        if folder.exists(f"student/{arm}.pt"):
            weights = Shared.of(folder.read_bytes(f"student/{arm}.pt"))
            networks[arm] = (config.student.arch, weights)
    accuracy: dict[str, Accuracy] = {}
    rejected = 0
    spans: list[Span] = []
    if config.test is not None:
        accuracy, rejected, spans = measure_accuracy(run, networks)
    scored = folder.marker("score")
    assert scored is not None
    counts = scored["counts"]
    prior, selection = folder.read_record(PRIOR), folder.read_record(SELECTION)

    def network(name: str) -> NetworkRecord:
        arch, _ = networks[name]
        found = accuracy.get(name)
        return {
            "top1": found["top1"] if found else None,
            "top5": found["top5"] if found else None,
            "per_class": found["per_class"] if found else None,
            "parameters": count_parameters(new_network(arch, config.teacher)),
            "arch": arch,
        }

    truth = selection["truth"]
    drift = drift_of_chunks(load_reference(folder), chunk_markers(folder))
    metrics: MetricsRecord = {
        "n_positives": folder.read_record(SELECTOR)["n_positives"],
        "n_corpus": counts["n_corpus"],
        "n_scored": counts["n_scored"],
        "n_rejected": counts["n_rejected"],
        "rejected_by_reason": counts["rejected_by_reason"],
        "n_duplicates": selection["n_duplicates"],
        "n_selected": selection["n_selected"],
        "n_test_rejected": rejected,
        "prior": {
            "value": prior["value"],
            "lower": prior["lower"],
            "upper": prior["upper"],
            "source": prior["source"],
            "used_for_training": prior["used_for_training"],
        },
        "teacher": network("teacher"),
        "student": network("student"),
        "selection": {
            "precision": truth["precision"] if truth else None,
            "recall": truth["recall"] if truth else None,
            "average_precision": truth["average_precision"] if truth else None,
        },
        "selection_estimated": selection["estimated"],
        "trust": trust_with(drift, prior),
        "audit": summarise_audit(folder),
        "drift": drift,
        "images_per_second": {"score": counts["images_per_second"]},
    }
    for arm in FURTHER:
        if arm in networks:
            metrics[arm] = network(arm)
    folder.write_record(METRICS, metrics)
    seconds = {"computing_seconds": round(covered_seconds(spans), 3)}
    return seconds | {name: f"{accuracy[name]['top1']:.4f}" for name in accuracy}
