"""Stage `evaluate`: accuracy of teacher and students on the test set, and `metrics.json`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.config import RunConfig, TeacherConfig
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.plan import sources_by_role
from pukd_ray.corpus.units import Unit
from pukd_ray.engine import Cluster
from pukd_ray.metrics import record
from pukd_ray.progress import progress
from pukd_ray.run_folder import RunFolder
from pukd_ray.selection.inference import Shared, TimedActor, pixel_spec, stack_pixels, stream
from pukd_ray.spans import Span, covered_seconds
from pukd_ray.storage import read_bytes


class CountCorrect(TimedActor):
    """Runs networks on labelled, decoded rows and counts per class: images, top-1 and top-5 hits."""

    def __init__(self, teacher: TeacherConfig, networks: dict[str, tuple[str, Any]]) -> None:
        import torch

        from pukd_ray.networks.teacher import Normalise, load_network, pick_device, use_threads

        use_threads()
        self._torch = torch
        self._device = pick_device()
        self._teacher = teacher
        self._spec = pixel_spec(teacher)
        self._normalise = Normalise(teacher).to(self._device)
        self._networks = {
            name: load_network(arch, teacher, ray.get(weights.ref), self._device, what=name)
            for name, (arch, weights) in networks.items()
        }

    def work(self, table: pa.Table) -> pa.Table:
        """Decoded rows -> one row of counts."""
        readable = table.column("error").is_null().to_numpy(zero_copy_only=False)
        labels = np.array([int(v) for v in table.column("label").to_pylist()])[readable]
        classes = self._teacher.num_classes
        counts = {"images": np.bincount(labels, minlength=classes).tolist()}
        if len(labels):
            torch = self._torch
            with torch.inference_mode():
                x = self._normalise(torch.from_numpy(stack_pixels(table.column("pixels"), self._spec)).to(self._device))
                for name, network in self._networks.items():
                    order = network(x).topk(min(5, classes), dim=1).indices.cpu().numpy()
                    hits = order == labels[:, None]
                    counts[f"{name}/top1"] = np.bincount(labels[hits[:, 0]], minlength=classes).tolist()
                    counts[f"{name}/top5"] = np.bincount(labels[hits.any(1)], minlength=classes).tolist()
        return pa.table({"rows": [table.num_rows], "counts": [json.dumps(counts)]})


def _as_is(table: pa.Table) -> pa.Table:
    return table


def measure_accuracy(
    config: RunConfig,
    cluster: Cluster,
    units: list[Unit],
    networks: dict[str, tuple[str, bytes]],
    spans: list[Span],
) -> tuple[dict[str, dict[str, Any]], int]:
    """Accuracy of each network on the test set, {name: {top1, top5, per_class}}, and unreadable test images."""
    sources = sources_by_role(config)
    labelled = index_labelled("test", units, sources["test"], config.teacher)
    refs = {name: (arch, Shared.of(weights)) for name, (arch, weights) in networks.items()}
    totals: dict[str, np.ndarray] = {}
    rows = 0
    with progress("evaluate", labelled.count, "images") as bar:
        for entry in stream(
            "evaluate", labelled.wanted, sources, config, cluster, CountCorrect, (config.teacher, refs), _as_is, spans
        ):
            for name, counts in json.loads(entry["counts"]).items():
                totals[name] = totals.get(name, 0) + np.array(counts)
            rows += entry["rows"]
            bar.update(entry["rows"])
    images = totals["images"]
    accuracy: dict[str, dict[str, Any]] = {
        name: {
            "top1": float(totals[f"{name}/top1"].sum() / images.sum()),
            "top5": float(totals[f"{name}/top5"].sum() / images.sum()),
            "per_class": [float(h / n) if n else None for h, n in zip(totals[f"{name}/top1"], images, strict=True)],
        }
        for name in networks
    }
    for name, figures in accuracy.items():
        record("top1", figures["top1"], network=name)
    return accuracy, rows - int(images.sum())


def evaluate_run(
    folder: RunFolder, config: RunConfig, cluster: Cluster, units: list[Unit], weights: bytes
) -> dict[str, Any]:
    """Run the stage and write `metrics.json`; without a test set accuracies are null."""
    from pukd_ray.networks.teacher import new_network
    from pukd_ray.networks.zoo import count_parameters

    networks = {"teacher": (config.teacher.arch, weights)}
    for arm in ("student", "student_last", "baseline_positives"):
        if folder.exists(f"student/{arm}.pt"):
            networks[arm] = (config.student.arch, read_bytes(folder.fs, folder.path(f"student/{arm}.pt")))
    accuracy: dict[str, dict[str, Any]] = {}
    rejected = 0
    spans: list[Span] = []
    if config.test is not None:
        accuracy, rejected = measure_accuracy(config, cluster, units, networks, spans)
    scored = folder.marker("score")
    assert scored is not None
    counts = scored["counts"]
    summary, prior = folder.read_json("selected/summary.json"), folder.read_json("selector/prior.json")
    meta = folder.read_json("selector/meta.json")

    def network(name: str) -> dict[str, Any]:
        arch, data = networks[name]
        del data
        nothing = {"top1": None, "top5": None, "per_class": None}
        return {
            **accuracy.get(name, nothing),
            "parameters": count_parameters(new_network(arch, config.teacher)),
            "arch": arch,
        }

    truth = summary["truth"] or {"precision": None, "recall": None, "average_precision": None}
    metrics = {
        "n_positives": meta["n_positives"],
        **{k: counts[k] for k in ("n_corpus", "n_scored", "n_rejected", "rejected_by_reason")},
        "n_duplicates": summary["n_duplicates"],
        "n_selected": summary["n_selected"],
        "n_test_rejected": rejected,
        "prior": {k: prior[k] for k in ("value", "lower", "upper", "source", "used_for_training")},
        **{name: network(name) for name in networks},
        "selection": {k: truth[k] for k in ("precision", "recall", "average_precision")},
        "selection_estimated": summary["estimated"],
        "images_per_second": {"score": counts["images_per_second"]},
    }
    folder.write_json("metrics.json", metrics)
    seconds = {"computing_seconds": round(covered_seconds(spans), 3)}
    return seconds | {name: f"{accuracy[name]['top1']:.4f}" for name in accuracy}
