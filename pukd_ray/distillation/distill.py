"""Stage `distill`: the compact student, by robust distillation on P + selected images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pukd_ray.config import RunConfig
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.reading import read_blocks
from pukd_ray.corpus.units import Unit
from pukd_ray.distillation.training import Arm, effective_classes, train_loop
from pukd_ray.engine import CPU_ACTOR_CPUS, IO_CPUS, Cluster, gpus_per_actor, spare_threads
from pukd_ray.progress import remote_progress
from pukd_ray.run_folder import RunFolder
from pukd_ray.selection.inference import DecodeImages, pixel_spec
from pukd_ray.selection.selector import train_run_config
from pukd_ray.spans import covered_seconds


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _encoded_positives(units: list[Unit], config: RunConfig) -> tuple[list[bytes | None], list[int]]:
    """(images, the teacher's indices of their labels) of P."""
    labelled = index_labelled("positives", units, config.positives, config.teacher)
    blocks = [b for w in labelled.wanted for b in read_blocks(w, config.positives[w.unit.source])]
    images = [image for block in blocks for image in block.column("image").to_pylist()]
    return images, [int(label) for block in blocks for label in block.column("label").to_pylist()]


class _ReadSelected:
    """File names -> the encoded images in them, as `_rows` has them."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        names = table.column("file").to_pylist()
        read = pa.concat_tables([self._folder.read_table(f, ["image", "pu_probability"]) for f in names])
        return _rows(read.column("image"), [-1] * read.num_rows, read.column("pu_probability"))


def _rows(images: Any, labels: Sequence[int], weights: Any) -> pa.Table:
    return pa.table(
        {
            "image": images,
            "error": pa.nulls(len(images), pa.string()),
            "label": pa.array(labels, pa.int64()),
            "weight": weights,
        }
    )


def _stream_of(
    folder: RunFolder, config: RunConfig, files: Sequence[str], positives: list[bytes | None], labels: list[int]
) -> Any:
    """Decoded P + selection as a dataset, for sets that do not fit the workers' memory."""
    first = _rows(pa.array(positives, pa.binary()), labels, pa.array([1.0] * len(labels), pa.float32()))
    read = _ReadSelected(folder)
    selected = ray.data.from_items([{"file": f} for f in files], override_num_blocks=len(files)).map_batches(
        read.__call__, batch_format="pyarrow", batch_size=1, num_cpus=IO_CPUS
    )
    decoded = (
        ray.data.from_arrow(first)
        .union(selected)
        .map_batches(DecodeImages(pixel_spec(config.teacher)), batch_format="pyarrow", num_cpus=IO_CPUS)
    )
    return decoded.map_batches(_readable_pixels, batch_format="pyarrow", num_cpus=IO_CPUS)


def _readable_pixels(table: pa.Table) -> pa.Table:
    return table.select(["pixels", "label", "weight"]).filter(pa.compute.is_valid(table.column("pixels")))


def distill_student(
    folder: RunFolder, config: RunConfig, cluster: Cluster, units: list[Unit], weights: bytes
) -> dict[str, Any]:
    """Run the stage; returns its counts. An interrupted training goes on from its last checkpoint."""
    files = tuple(f for f in folder.files("selected") if f.endswith(".parquet"))
    n_selected = folder.read_json("selected/summary.json")["n_selected"]
    refs = _encoded_positives.remote([u for u in units if u.role == "positives"], config)
    t = config.teacher
    n_positives = sum(u.rows for u in units if u.role == "positives")
    streamed = (n_selected + n_positives) * t.channels * t.input_size**2 > config.distill.memory_gib * 2**30
    gpus = gpus_per_actor(config.resources, cluster)
    # A streaming worker leaves CPU for the readers that feed it, even on a cluster of one.
    share = CPU_ACTOR_CPUS if streamed else 1.0
    positives, labels = ray.get(refs)
    arms = [Arm("student", files, streamed)]
    if config.distill.baseline == "positives":
        arms.append(Arm("baseline_positives", ()))
    with remote_progress("distill") as counter:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "folder": folder,
                "config": config,
                "weights": ray.put(weights),
                "positives": positives,
                "labels": labels,
                "arms": arms,
                "count": n_selected + len(positives),
                "threads": spare_threads(cluster, config.resources.train_workers),
                "counter": counter,
            },
            scaling_config=ScalingConfig(
                num_workers=config.resources.train_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": share, "GPU": gpus} if gpus else {"CPU": share},
            ),
            run_config=train_run_config(folder, "student"),
            datasets={"student": _stream_of(folder, config, files, positives, labels)} if streamed else None,
        )
        report: dict[str, Any] = trainer.fit().return_value
    student = report["arms"]["student"]
    done = {name: student[name] for name in ("steps", "images")}
    meta = folder.read_json("selector/meta.json")
    folder.write_json(
        "student/class_weights.json",
        {
            "classes": meta["classes"],
            "kind": config.distill.class_weights,
            **{k: student[k] for k in ("class_weights", "class_sums")},
            "effective_classes": effective_classes(np.array(student["class_sums"])),
        },
    )
    folder.write_json(
        "student/training.json",
        {**done, "loss": {a: r["history"] for a, r in report["arms"].items()}},
    )
    folder.write_json(
        "student/meta.json",
        {
            "arch": config.student.arch,
            "num_classes": t.num_classes,
            "classes": meta["classes"],
            "preprocessing": {
                "input_size": t.input_size,
                "channels": t.channels,
                "mean": list(t.mean),
                "std": list(t.std),
                "resize": t.resize,
            },
            "teacher": t.arch,
            **done,
        },
    )
    folder.delete_folder("student/train")  # Ray Train's own checkpoints: the stage is done
    return {
        "computing_seconds": round(covered_seconds([report["span"]]), 3),
        **done,
        "student": config.student.arch,
    }
