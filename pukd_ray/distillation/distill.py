"""Stage `distill`: the compact student, by robust distillation on P + selected images."""

from __future__ import annotations

from typing import Any

import numpy as np

from pukd_ray.config import RunConfig, TeacherConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.distillation.training import effective_classes
from pukd_ray.distillation.training_set import positives_of
from pukd_ray.distillation.worker import CHECKPOINT, Arm, train_loop
from pukd_ray.run.records import SELECTION, SELECTOR, STUDENT, Preprocessing, StudentRecord
from pukd_ray.runtime.console import remote_progress
from pukd_ray.runtime.engine import CPU_ACTOR_CPUS, decoder_cpus
from pukd_ray.runtime.timing import covered_seconds
from pukd_ray.runtime.train_group import train_group
from pukd_ray.storage import read_file


def preprocessing_of(teacher: TeacherConfig) -> Preprocessing:
    """How pixels become the input of the teacher, and of its students."""
    mean, std = teacher.normalisation
    return {
        "input_size": teacher.input_size,
        "channels": teacher.channels,
        "mean": list(mean),
        "std": list(std),
        "resize": teacher.resize,
    }


def start_of(config: RunConfig) -> Shared | None:
    """What `student.start` holds, for all workers."""
    return None if config.student.start is None else Shared.of(read_file(config.student.start))


def distill_student(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts. An interrupted training goes on from its last checkpoint."""
    folder, config = run.folder, run.config
    classes = folder.read_record(SELECTOR)["classes"]
    positives = positives_of(folder, config, run.units)
    images = positives.with_selected("selected", folder.read_record(SELECTION)["n_selected"])
    streamed = not images.fits_memory(config)
    # A streaming worker leaves CPU for the readers that feed it, even on a cluster of one.
    share = CPU_ACTOR_CPUS if streamed else 1.0
    arms = [Arm("student", images, streamed)]
    if config.distill.baseline == "positives":
        arms.append(Arm("baseline_positives", positives))
    about = {
        "arch": config.student.arch,
        "num_classes": config.teacher.num_classes,
        "classes": classes,
        "preprocessing": preprocessing_of(config.teacher),
    }
    with remote_progress("distill") as counter:
        setup = {"folder": folder, "config": config, "weights": run.weights, "start": start_of(config)}
        setup |= {"arms": arms, "about": about, "counter": counter}
        datasets = {"student": images.stream(config, decoder_cpus(run.cluster))} if streamed else None
        report = train_group(train_loop, setup, folder, "student", config.resources, run.cluster, share, datasets)
    student = report["arms"]["student"]
    done = {name: student[name] for name in ("steps", "images")}
    folder.write_json(
        "student/class_weights.json",
        {
            "classes": classes,
            "kind": config.distill.class_weights,
            **{k: student[k] for k in ("class_weights", "class_sums")},
            "effective_classes": effective_classes(np.array(student["class_sums"])),
        },
    )
    folder.write_json(
        "student/training.json",
        {**done, "loss": {a: r["history"] for a, r in report["arms"].items()}},
    )
    record: StudentRecord = {
        "arch": config.student.arch,
        "num_classes": config.teacher.num_classes,
        "classes": classes,
        "preprocessing": preprocessing_of(config.teacher),
        "teacher": config.teacher.arch,
        "steps": student["steps"],
        "images": student["images"],
    }
    folder.write_record(STUDENT, record)
    folder.delete_folder("student/train-student")  # Ray Train's own files: the stage is done
    if folder.exists(CHECKPOINT):
        folder.delete(CHECKPOINT)
    return {
        "computing_seconds": round(covered_seconds([report["span"]]), 3),
        **done,
        "student": config.student.arch,
    }
