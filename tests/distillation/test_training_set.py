"""Streams of labelled images: a folder comes class by class, its batches must not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pukd_ray.config import DistillConfig, RunConfig, SourceConfig, TeacherConfig
from pukd_ray.corpus.labelled import index_sources
from pukd_ray.corpus.pixels import PixelSpec
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.units import Unit
from pukd_ray.distillation.data import Streamed
from pukd_ray.distillation.training_set import TrainingSet, mix_units
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import ALONE

CLASSES, EACH = 3, 40


def run_config(teacher: TeacherConfig, source: SourceConfig, **distill: float) -> RunConfig:
    return RunConfig(teacher=teacher, positives=(source,), corpus=(source,), distill=DistillConfig(**distill), seed=1)


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
    iterator = training.stream(run_config(teacher, source), 0.25).iterator()
    images = Streamed(iterator, training.count, spec, 20, buffer_bytes=60 * 64, seed=2)
    batches = [images.batch(step) for step in range(6)]
    assert [len(set(batch.labels.tolist())) for batch in batches] == [CLASSES] * 6
    assert np.bincount(np.concatenate([b.labels.numpy() for b in batches])).tolist() == [EACH] * CLASSES
    for batch in batches:  # pixels and labels stay together
        assert (batch.pixels[:, 0, 0, 0] // 10).tolist() == batch.labels.tolist()


@pytest.mark.usefixtures("ray_cluster")
def test_a_stream_of_which_p_has_a_share(tmp_path: Path) -> None:
    """P is held in memory and not in the stream; what is selected is all in the stream."""

    def png(value: int) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(sink, "PNG")
        return sink.getvalue()

    for label in range(CLASSES):
        (tmp_path / "p" / f"class{label}").mkdir(parents=True)
        (tmp_path / "p" / f"class{label}" / "0.png").write_bytes(png(label))
    (tmp_path / "run" / "selected").mkdir(parents=True)
    rows = {"image": [png(100 + i) for i in range(EACH)], "pu_probability": np.full(EACH, 0.5, np.float32)}
    pq.write_table(pa.table(rows), tmp_path / "run" / "selected" / "0.parquet")
    source = SourceConfig(uri=str(tmp_path / "p"))
    teacher = TeacherConfig(
        arch="lenet5", weights="none", num_classes=CLASSES, input_size=8, channels=1, mean=(0.5,), std=(0.5,)
    )
    config = run_config(teacher, source, positive_share=0.3, batch_size=10, memory_gib=1e-9)
    labelled = index_sources("positives", (source,), teacher, print)
    folder = RunFolder(str(tmp_path / "run"))
    training = TrainingSet(labelled.count, labelled.requests, {"positives": (source,)}, folder)
    training = training.with_selected("selected", EACH)
    images = training.images(config, ALONE, training.stream(config, 0.25).iterator())
    batches = [images.batch(step).pixels[:, 0, 0, 0].numpy() for step in range(5)]
    assert all(np.array_equal(batch < 100, np.arange(10) < 3) for batch in batches)
    seen = np.concatenate(batches)
    assert sorted(seen[seen < 100].tolist()) == sorted([0, 1, 2] * 5)
    assert len(set(seen[seen >= 100].tolist())) == 7 * 5
    whole = np.concatenate([batch.pixels[:, 0, 0, 0].numpy() for batch in images.all_batches()])
    assert sorted(whole.tolist()) == [*range(CLASSES), *range(100, 100 + EACH)]


def test_a_sample_has_that_many_different_images_with_their_labels() -> None:
    groups = tuple(group(number, number) for number in range(3))  # 60 wanted images
    training = TrainingSet(60, groups, {}, RunFolder("nowhere"))
    sample = training.sample(25, seed=3)
    assert sample.count == sum(len(w.labels) for w in sample.labelled if w.labels is not None) == 25
    drawn = [(w.unit.files[p], k) for w in sample.labelled for p, k in zip(w.positions, w.labels, strict=True)]
    wanted = {(w.unit.files[p], k) for w in groups for p, k in zip(w.positions, w.labels, strict=True)}
    assert len(set(drawn)) == 25
    assert set(drawn) < wanted
    assert training.sample(25, seed=4).labelled[0].positions.tolist() != sample.labelled[0].positions.tolist()
    assert training.sample(100, seed=3).count == 60


@pytest.mark.usefixtures("ray_cluster")
def test_workers_decode_each_image_once_and_have_all_in_one_order(tmp_path: Path) -> None:
    for label in range(CLASSES):
        (tmp_path / "p" / f"class{label}").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), label, np.uint8)).save(tmp_path / "p" / f"class{label}" / "0.png")
    (tmp_path / "run" / "selected").mkdir(parents=True)
    for number in range(3):
        sinks = [io.BytesIO() for _ in range(5)]
        for i, sink in enumerate(sinks):
            Image.fromarray(np.full((8, 8), 100 + 10 * number + i, np.uint8)).save(sink, "PNG")
        rows = {"image": [sink.getvalue() for sink in sinks], "pu_probability": np.full(5, number / 10, np.float32)}
        pq.write_table(pa.table(rows), tmp_path / "run" / "selected" / f"{number}.parquet")
    source = SourceConfig(uri=str(tmp_path / "p"))
    teacher = TeacherConfig(
        arch="lenet5", weights="none", num_classes=CLASSES, input_size=8, channels=1, mean=(0.5,), std=(0.5,)
    )
    labelled = index_sources("positives", (source,), teacher, print)
    folder = RunFolder(str(tmp_path / "run"))
    training = TrainingSet(labelled.count, labelled.requests, {"positives": (source,)}, folder)
    training = training.with_selected("selected", 15)
    spec = PixelSpec(8, 1, "crop")

    def load(rank: int) -> tuple[list[int], list[float], int]:
        """(first pixels, weights, images that this rank decoded)."""
        import torch.distributed as dist

        import pukd_ray.distillation.data as data
        from pukd_ray.runtime.devices import Worker

        decoded, decode = [], data.decode
        data.decode = lambda *image: decoded.append(1) or decode(*image)
        dist.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=2, rank=rank)
        try:
            batch = training.load(spec, Worker(rank, 2))
        finally:
            dist.destroy_process_group()
            data.decode = decode
        return batch.pixels[:, 0, 0, 0].tolist(), batch.weights.tolist(), len(decoded)

    (first, weights, some), (again, _, others) = ray.get([ray.remote(load).remote(rank) for rank in range(2)])
    alone = training.load(spec)
    assert first == again == alone.pixels[:, 0, 0, 0].tolist()
    assert first == [*range(CLASSES), *range(100, 105), *range(110, 115), *range(120, 125)]
    assert weights == alone.weights.tolist()
    assert (some, others) == (8, 10)
