"""The run that is disturbed, of seconds: a few images of the bundled demo, a few steps; and what one leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES, ROWS = 8, 200
"""Of the corpus; each file is a chunk."""
POSITIVES_PER_CLASS = 12
STEPS = 20

EXACT = ("image_id", "source_row", "content_hash", "error", "teacher_label", "relevant")
"""Columns that are the same in any run; the others are sums, whose order may differ with the cut of the work."""
TOLERANCE = 1e-3


def write_task(folder: Path) -> Path:
    """The data, cut down, and the config, below `folder`; returns the config."""
    import yaml

    demo = Path(str(files("pukd_ray.demo")))
    lake = folder / "lake"
    lake.mkdir(parents=True)
    for i in range(FILES):
        table = pq.read_table(demo / "corpus" / f"part-{i % 4}.parquet").slice(i // 4 * ROWS, ROWS)
        ids = [f"../../../{i}/<{row}>" for row in range(ROWS)]  # as whoever fills a corpus may like them
        pq.write_table(table.append_column("key", pa.array(ids)), lake / f"part-{i}.parquet")
    config: dict[str, Any] = yaml.safe_load((demo / "demo.yaml").read_text())
    teacher = config["teacher"] | {"weights": str(demo / "teacher.pt"), "classes": str(demo / "classes.txt")}
    config |= {
        "name": "soak",
        "output_is_shared": True,
        "teacher": teacher,
        "positives": {"uri": str(demo / "positives.parquet"), "per_class": POSITIVES_PER_CLASS},
        "corpus": {"uri": str(lake), "relevant_column": "relevant", "id_column": "key"},
        "test": {"uri": str(demo / "test.parquet"), "rows": [0, 100]},
        "selector": {"steps": STEPS, "batch_size": 64, "lr": 0.003, "prior": 0.25, "views": 1, "sample": 300},
        "score": {"chunk_images": ROWS},
        "selection": {"rule": "budget", "budget": 50},
        "distill": {"steps": 10 * STEPS, "batch_size": 32, "lr": 0.03, "augment": "none"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def manifests(run: Path) -> dict[str, bytes]:
    """Of the chunks that are committed, by file name."""
    return {p.name: p.read_bytes() for p in sorted((run / "markers" / "score").glob("*.json"))}


def attempts(run: Path) -> list[str]:
    """Attempts at chunks that are not committed."""
    return sorted(p.name for p in (run / "attempts").glob("*"))


@dataclass(frozen=True)
class Left:
    """What a finished run has left, to be compared."""

    scores: pa.Table
    selected: list[str]
    student: dict[str, np.ndarray]
    """Its weights."""
    steps: int
    """At which the last loss of its training was noted."""

    @classmethod
    def of(cls, run: Path) -> Left:
        """Everything that a manifest names, and nothing else."""
        from pukd_ray.networks.teacher import load_state

        named = [f for manifest in manifests(run).values() for f in json.loads(manifest)["files"]]
        scores = pa.concat_tables([pq.read_table(run / name) for name in named])
        selected = [pq.read_table(f, columns=["image_id"]) for f in sorted((run / "selected").glob("*.parquet"))]
        state = load_state((run / "student" / "student.pt").read_bytes())
        training = json.loads((run / "student" / "training.json").read_text())
        return cls(
            scores.sort_by("image_id"),
            pa.concat_tables(selected).column("image_id").to_pylist(),
            {name: value.numpy() for name, value in state.items()},
            training["loss"]["student"][-1][0],
        )


@dataclass(frozen=True)
class Difference:
    """Of a run from the undisturbed one."""

    images: int
    lost: int
    double: int
    faults: tuple[str, ...]
    """What else is not as it should be."""


def compare(run: Path, calm: Left) -> Difference:
    """What the finished `run` lost, did twice, or has otherwise than the undisturbed one."""
    left, faults = Left.of(run), []
    ids, expected = left.scores.column("image_id").to_pylist(), calm.scores.column("image_id").to_pylist()
    lost, double = len(set(expected) - set(ids)), len(ids) - len(set(ids))
    kept = [json.loads(manifest) for manifest in manifests(run).values()]
    named = sorted(name for manifest in kept for name in manifest["files"])
    if named != sorted(f"scores/{p.name}" for p in (run / "scores").iterdir()):
        faults.append("scores/ holds other files than the manifests name")
    units = [unit for manifest in kept for unit in manifest["units"]]
    if len(units) != len(set(units)):
        faults.append("a unit is in two chunks")
    if attempts(run):
        faults.append("attempts are left")
    if ids == expected:
        faults += _differing(left.scores, calm.scores)
    if left.selected != calm.selected:
        faults.append("other images are selected")
    if left.steps != calm.steps or any(
        not np.allclose(value, calm.student[name], atol=TOLERANCE) for name, value in left.student.items()
    ):
        faults.append("the student is another")
    return Difference(len(ids), lost, double, tuple(faults))


def _differing(found: pa.Table, expected: pa.Table) -> list[str]:
    faults = []
    for name in expected.column_names:
        a, b = found.column(name), expected.column(name)
        if name in EXACT:
            same = a.equals(b)
        elif pa.types.is_floating(a.type):
            ours, theirs = (c.to_numpy(zero_copy_only=False) for c in (a, b))
            same = bool(np.allclose(ours, theirs, atol=TOLERANCE, equal_nan=True))
        else:
            continue  # `source`, a path of both, and which bytes are kept, which goes by the scores
        if not same:
            faults.append(f"column {name} differs")
    return faults
