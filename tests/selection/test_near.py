"""Near-copies in stage `select`: who goes, what is told, and what is shown of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_types import faults_of
from synthetic import corpus, labelled

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.perceptual import hash_column, perceptual_hashes
from pukd_ray.corpus.pixels import decode, encode_png, pixel_spec
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.reading import content_hash
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import units_from_table
from pukd_ray.errors import RunError
from pukd_ray.report.page import _near_pairs
from pukd_ray.run.folder import SCORES_SCHEMA, RunFolder
from pukd_ray.run.records import SelectionRecord
from pukd_ray.selection import near, select
from pukd_ray.selection.calibration import Calibration, to_json

pytestmark = pytest.mark.usefixtures("ray_cluster")
TEACHER = {"arch": "lenet5", "weights": "t.pt", "num_classes": 4, "input_size": 16, "channels": 1}
OF_TEST, OF_P, OF_U, EXACT = 5, 7, 11, 3


def noisy(image: bytes, config: RunConfig, rng: np.random.Generator) -> bytes:
    """The same picture in other bytes."""
    pixels = decode(image, pixel_spec(config.teacher)).astype(int)
    return encode_png(np.clip(pixels + rng.integers(-3, 4, pixels.shape), 0, 255).astype(np.uint8))


def scored(images: list[bytes], file: Path, config: RunConfig) -> pa.Table:
    """Rows of `scores/`, all of them positive."""
    spec = pixel_spec(config.teacher)
    hashes, has = perceptual_hashes(np.stack([decode(image, spec) for image in images]))
    count = len(images)
    columns = {
        "image_id": [f"u.parquet#{i}" for i in range(count)],
        "source": [str(file)] * count,
        "source_row": list(range(count)),
        "content_hash": [content_hash(image) for image in images],
        "pu_logit": [1.0] * count,
        "pu_probability": [0.7] * count,
        "teacher_label": [0] * count,
        "teacher_confidence": [0.9] * count,
        "perceptual_hash": hash_column(hashes, has, np.ones(count, bool)),
        "image": [image if i % 2 else None for i, image in enumerate(images)],  # the rest comes from the corpus
    }
    return pa.table([columns.get(f.name, pa.nulls(count, f.type)) for f in SCORES_SCHEMA], schema=SCORES_SCHEMA)


def test_near_copies_go_leaks_are_told_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "u.parquet"
    config = RunConfig(
        output=str(tmp_path / "run"),
        teacher=TEACHER | {"mean": [0.3], "std": [0.3]},
        positives={"uri": str(tmp_path / "p.parquet")},
        corpus={"uri": str(file)},
        test={"uri": str(tmp_path / "test.parquet")},
        selection={"rule": "all", "deduplicate": "near"},
    )
    rng = np.random.default_rng(8)
    p, test, u = (t.column("image").to_pylist() for t in (labelled(40, 1), labelled(40, 2), corpus(200, 0.3, 3)))
    test[-1] = noisy(p[-1], config, rng)  # a leak among the labelled images
    of = [*test[:OF_TEST], *p[:OF_P], *u[:OF_U]]
    everything = [*u, *(noisy(image, config, rng) for image in of), *u[20 : 20 + EXACT]]
    pq.write_table(pa.table({"image": everything}), file)
    for name, images in (("p", p), ("test", test)):
        pq.write_table(pa.table({"image": images, "label": [i % 4 for i in range(40)]}), tmp_path / f"{name}.parquet")
    folder = RunFolder(config.output)
    table = scored(everything, file, config)
    files = [f"scores/00000-{i}.parquet" for i in range(3)]
    for i, name in enumerate(files):
        folder.write_table(name, table.slice(i * 80, 80))
    folder.write_json("markers/score/00000.json", {"files": files, "columns": ["perceptual_hash"]})
    held_out = {"logit": [0.0, 1.0], "role": ["corpus", "positives"], "weight": [1.0, 1.0]}
    folder.write_table("selector/held_out.parquet", pa.table(held_out))
    folder.write_json("selector/calibration.json", to_json(Calibration(1.0, 0.0), [Calibration(0.9, 0.1)] * 3))
    folder.write_json("selector/prior.json", {"value": 0.3, "trust": "low"})
    sources = sources_by_role(config)
    plan_inputs(folder, sources, list_inputs(sources).table, print)
    units = units_from_table(folder.read_table("plan.parquet"))
    monkeypatch.setattr(select, "FILES_PER_TASK", 1)

    summary = select.select_images(folder, config, units)
    assert faults_of(summary, SelectionRecord, "selection.json") == []
    found = summary["near"]
    assert found is not None
    assert found["dropped"] == {"test": OF_TEST, "positives": OF_P, "corpus": OF_U}
    assert found["positives_in_test"] == 1
    assert summary["n_duplicates"] == OF_TEST + OF_P + OF_U + EXACT
    assert summary["n_selected"] == len(u)
    # Of each pair within U one is there.
    chosen = {i for name in folder.files("selected") for i in folder.read_table(name).column("image_id").to_pylist()}
    first = len(u) + OF_TEST + OF_P
    assert all(len({f"u.parquet#{i}", f"u.parquet#{first + i}"} & chosen) == 1 for i in range(OF_U))
    assert not {f"u.parquet#{i}" for i in range(len(u), first)} & chosen

    shown = folder.read_table(near.NEAR_FILE).to_pylist()
    kinds = [(row["image"].partition("/")[0], row["other"].partition("/")[0]) for row in shown]
    assert set(kinds[0]) == {"positives", "test"}
    assert kinds[1:] == [("corpus", k) for k in ["test"] * OF_TEST + ["positives"] * OF_P + ["corpus"] * OF_U]
    spec = pixel_spec(config.teacher)
    for row in shown:
        one, other = (decode(row[f"{k}_picture"], spec).astype(int) for k in ("image", "other"))
        assert np.abs(one - other).max() <= 3
        assert 0 <= row["bits"] <= found["radius"]
    pairs = _near_pairs(folder)
    assert all(uri.startswith("data:image/png") for pair in pairs for _, _, uri in pair["images"])

    exact = replace(config, selection=SelectionConfig(rule="all", deduplicate="exact"))
    summary = select.select_images(folder, exact, units)
    assert (summary["near"], summary["n_duplicates"]) == (None, EXACT)
    monkeypatch.setattr(near, "MOST_ROWS", 100)
    with pytest.raises(RunError, match=r"near is for 100 images at most"):
        select.select_images(folder, config, units)
