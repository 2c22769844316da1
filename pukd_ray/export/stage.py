"""Stage `export`: the student in the formats that the config asks for, each checked against PyTorch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import ray

from pukd_ray.config import ExportConfig, RunConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.distillation.training_set import TrainingSet, positives_of
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import EXPORT, STUDENT, CheckedRecord, ExportRecord
from pukd_ray.runtime.timing import Stopwatch

if TYPE_CHECKING:
    from pukd_ray.export.formats import Runner

CHECKED = 2000
"""Test images, at most, on which a file is compared with PyTorch."""
CALIBRATED = 256
"""Images that int8 ranges are taken from, half of them P; ONNX Runtime's guide asks for a few hundred."""
BATCH = 64
TIMED_SECONDS = 1.0
GAP = 0.01  # of a probability: float32 added up in another order differs by a thousandth of it


@dataclass(frozen=True)
class CheckImages:
    """Pixels uint8 [N, C, S, S] on which files are compared with PyTorch, and their classes; -1: not known."""

    pixels: np.ndarray
    labels: np.ndarray

    @property
    def known(self) -> bool:
        """Whether there are labels."""
        return bool((self.labels >= 0).all()) and len(self.labels) > 0


def export_student(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts. RunError if a float file does not say what PyTorch says, or one says NaN."""
    folder, config = run.folder, run.config
    positives = positives_of(folder, config, run.units).sample(CALIBRATED // 2, config.seed)
    test = None
    if config.test is not None:
        labelled = index_labelled("test", run.units, sources_by_role(config)["test"], config.teacher)
        test = TrainingSet(labelled.count, labelled.requests, sources_by_role(config), folder)
        test = test.sample(CHECKED, config.seed)
    folder.delete_folder("export")
    record, seconds = ray.get(_export.remote(folder, config, positives, test))
    folder.write_record(EXPORT, record)
    return {"computing_seconds": seconds} | {
        name: f"{file['bytes'] / 1e6:.2f} MB, agrees {file['agreement']:.4f}, {file['milliseconds']:.2f} ms"
        for name, file in record["files"].items()
    }


@ray.remote(num_cpus=1)
def _export(
    folder: RunFolder, config: RunConfig, positives: TrainingSet, test: TrainingSet | None
) -> tuple[ExportRecord, float]:
    """(what was written and found, seconds)."""
    import torch

    from pukd_ray.distillation.data import decode_all
    from pukd_ray.runtime.devices import use_threads

    use_threads()
    watch, spec = Stopwatch(), pixel_spec(config.teacher)
    drawn = _selected_images(folder, CALIBRATED // 2 + (CHECKED if test is None else 0))
    chosen = decode_all(drawn[: CALIBRATED // 2], spec).pixels
    calibration = torch.cat([positives.load(spec).pixels, chosen]).numpy()
    found = decode_all(drawn[CALIBRATED // 2 :] or drawn, spec) if test is None else test.load(spec)
    assert config.export is not None
    check = CheckImages(found.pixels.numpy(), found.labels.numpy())
    record = write_files(folder, config.export, calibration, check)
    return record, round(watch.seconds, 3)


def _selected_images(folder: RunFolder, count: int) -> list[bytes]:
    """The first of the selection, which are a random part of it."""
    images: list[bytes] = []
    for name in folder.files("selected"):
        with folder.open(name) as source:
            for batch in pq.ParquetFile(source).iter_batches(batch_size=min(count, 1024), columns=["image"]):
                images += batch.column("image").to_pylist()
                if len(images) >= count:
                    return images[:count]
    return images


def write_files(folder: RunFolder, settings: ExportConfig, calibration: np.ndarray, check: CheckImages) -> ExportRecord:
    """Write the student of a run in all formats asked for into its folder `export`; what was found is returned.

    `calibration` uint8 [M, C, S, S]. RunError if a float file does not say what PyTorch says, or one says NaN.
    """
    import torch

    from pukd_ray.distillation.student import assemble_student
    from pukd_ray.export.formats import FORMATS, Classifier, trace

    meta, weights = folder.read_record(STUDENT), folder.read_bytes("student/student.pt")
    student = assemble_student(meta, weights, "student/student.pt", torch.device("cpu"))
    kind = np.dtype(settings.input)
    classifier = Classifier(student.normalise, student.network).eval().requires_grad_(False)
    about = {
        "arch": meta["arch"],
        "classes": json.dumps(student.classes),
        "preprocessing": json.dumps(meta["preprocessing"]),
        "pixels": "0 to 255; normalisation is in the graph",
    }
    example = np.zeros((2, *student.spec.shape), kind)
    graph = trace(classifier, example, calibration.astype(kind), about)

    def in_torch(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            probabilities: np.ndarray = classifier(torch.from_numpy(pixels)).numpy()
            return probabilities

    expected = _in_batches(in_torch, check.pixels.astype(kind))
    files: dict[str, CheckedRecord] = {}
    for name in settings.formats:
        chosen = FORMATS[name]
        data = chosen.write(graph)
        files[name] = compare(chosen.load(data), len(data), check, kind, expected)
        files[name]["file"], files[name]["runtime"] = f"export/{chosen.file}", chosen.runtime
        gap = files[name]["largest_difference"]
        if math.isnan(gap) or (chosen.exact and gap > GAP):
            raise RunError(
                f"export: probabilities of {chosen.file} differ by up to {gap:.3f} from PyTorch's: the network "
                "computes something else in that format; leave it out of export.formats"
            )
        folder.write_bytes(f"export/{chosen.file}", data)
    return {
        "arch": meta["arch"],
        "classes": list(student.classes),
        "input": {"name": "pixels", "type": settings.input, "shape": ["N", *student.spec.shape], "range": [0, 255]},
        "output": {"name": "probabilities", "type": "float32", "shape": ["N", len(student.classes)]},
        "preprocessing": meta["preprocessing"],
        "images": len(check.pixels),
        "role": "test" if check.known else "selected",
        "calibration_images": len(calibration),
        "cpu": _cpu(),
        "pytorch": compare(in_torch, len(weights), check, kind, expected),
        "files": files,
    }


def compare(run: Runner, size: int, check: CheckImages, kind: np.dtype[Any], expected: np.ndarray) -> CheckedRecord:
    """What a file of `size` bytes says of the images, against the `expected` probabilities [N, K] of PyTorch."""
    found = _in_batches(run, check.pixels.astype(kind))
    classes = found.argmax(1)
    return {
        "file": "student/student.pt",
        "runtime": "PyTorch",
        "bytes": size,
        "top1": float((classes == check.labels).mean()) if check.known else None,
        "agreement": float((classes == expected.argmax(1)).mean()),
        "largest_difference": float(np.abs(found - expected).max()),
        "milliseconds": 1000 * _seconds(lambda: run(check.pixels[:1].astype(kind))),
    }


def _in_batches(run: Runner, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([run(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])


def _seconds(action: Callable[[], object]) -> float:
    """Median of as many calls as fit into `TIMED_SECONDS`, after the first."""
    action()
    taken: list[float] = []
    began = time.perf_counter()
    while not taken or time.perf_counter() - began < TIMED_SECONDS:
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return median(taken)


def _cpu() -> str:
    """The CPU's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
