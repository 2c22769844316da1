"""Streams of labelled images: a folder comes class by class, its batches must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pukd_ray.config import SourceConfig, TeacherConfig
from pukd_ray.corpus.labelled import index_sources
from pukd_ray.corpus.pixels import PixelSpec
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.units import Unit
from pukd_ray.distillation.data import Streamed
from pukd_ray.distillation.training_set import TrainingSet, mix_units
from pukd_ray.run.folder import RunFolder

CLASSES, EACH = 3, 40


def group(number: int, label: int, kind: str = "images") -> ReadRequest:
    """40 images of one class, of which every second is wanted."""
    names = tuple(f"{label}/{number}-{i}.png" for i in range(EACH))
    unit = Unit(unit_id=names[0], role="train", source=0, format=kind, files=names, ids=names, start=0, rows=len(names))
    return ReadRequest(unit, np.arange(0, EACH, 2), np.full(EACH // 2, label))


def test_single_images_are_dealt_anew_and_nothing_is_lost() -> None:
    groups = [group(number, number // 30) for number in range(90)]  # 1,800 wanted images, class by class
    mixed = mix_units(groups, seed=5)

    def images(wanted: list[ReadRequest]) -> list[tuple[str, int]]:
        return sorted(
            (w.unit.files[position], label)
            for w in wanted
            if w.positions is not None and w.labels is not None
            for position, label in zip(w.positions.tolist(), w.labels.tolist(), strict=True)
        )

    assert images(mixed) == images(groups)
    assert all(w.unit.rows == len(w.unit.files) == len(w.unit.ids) for w in mixed)
    for wanted in mixed:
        assert wanted.labels is not None
        assert np.bincount(wanted.labels, minlength=CLASSES).min() > 100
    assert images(mixed[:1]) == images(mix_units(groups, seed=5)[:1]) != images(mix_units(groups, seed=6)[:1])


def test_files_of_many_images_change_places_only() -> None:
    tables = [group(number, 0, "parquet") for number in range(20)]
    mixed = mix_units(tables, seed=5)
    assert mixed != tables
    assert sorted(mixed, key=tables.index) == tables


@pytest.mark.usefixtures("ray_cluster")
def test_batches_of_a_sorted_folder_have_all_classes(tmp_path: Path) -> None:
    for label in range(CLASSES):
        (tmp_path / f"class{label}").mkdir()
        for i in range(EACH):
            pixels = np.full((8, 8), 10 * label + i % 10, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"class{label}" / f"{i}.png")
    source = SourceConfig(uri=str(tmp_path))
    teacher = TeacherConfig(
        arch="lenet5", weights="none", num_classes=CLASSES, input_size=8, channels=1, mean=(0.5,), std=(0.5,)
    )
    labelled = index_sources("original", (source,), teacher, print)
    training = TrainingSet(labelled.count, labelled.requests, {"original": (source,)}, RunFolder(str(tmp_path)))
    spec = PixelSpec(8, 1, "crop")
    iterator = training.stream(spec, 0.25, seed=1).iterator()
    images = Streamed(iterator, training.count, spec, 20, buffer_bytes=60 * 64, seed=2)
    batches = [images.batch(step) for step in range(6)]
    assert [len(set(batch.labels.tolist())) for batch in batches] == [CLASSES] * 6
    assert np.bincount(np.concatenate([b.labels.numpy() for b in batches])).tolist() == [EACH] * CLASSES
    for batch in batches:  # pixels and labels stay together
        assert (batch.pixels[:, 0, 0, 0] // 10).tolist() == batch.labels.tolist()
