"""What the actors of a pass do with decoded rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr

from pukd_ray import load_config
from pukd_ray.cli import DEMO_CONFIG
from pukd_ray.config import TeacherConfig
from pukd_ray.corpus.pixels import PixelSpec, decode_batch, pixel_spec
from pukd_ray.networks import actor
from pukd_ray.networks.actor import TeacherActor, pixel_rows
from pukd_ray.networks.teacher import Teacher, dump_state, new_network
from pukd_ray.runtime import devices
from pukd_ray.runtime.devices import Precision

DEMO = DEMO_CONFIG.parent
CPU = torch.device("cpu")
TEACHER = TeacherConfig(arch="lenet5", weights="w", num_classes=3, input_size=28, channels=1, mean=[0.0], std=[1.0])
SPEC = PixelSpec(28, 1, "crop")


@dataclass(frozen=True)
class Here:
    value: bytes

    def get(self) -> bytes:
        return self.value


class Keeps(TeacherActor):
    def work(self, table: pa.Table) -> pa.Table:
        return table


def decoded(images: list[np.ndarray | None]) -> pa.Table:
    pixels = pa.array([None if image is None else image.tobytes() for image in images], pa.binary())
    errors = pa.array(["corrupt: x" if image is None else None for image in images], pa.string())
    return pa.table({"pixels": pixels, "error": errors})


def image(value: int) -> np.ndarray:
    return np.full((1, 28, 28), value, np.uint8)


def test_what_16_bits_cannot_hold_is_computed_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = new_network("lenet5", TEACHER)
    with torch.no_grad():
        network.conv1.weight.mul_(0).add_(2e4)  # bright images pass 65,504, black ones do not
    weights = dump_state(network.state_dict())
    monkeypatch.setattr(actor, "assigned_device", lambda: CPU)
    for module in (devices, actor):
        monkeypatch.setattr(module, "half_type", lambda _, precision, **__: None if precision == "float32" else kind)
    images = [image(0), image(255), None, image(250), image(1)]
    found = {}
    for kind in (torch.float16, None):
        table, readable, pixels, columns = Keeps(TEACHER, Here(weights), 1).forward(decoded(images))
        assert table.column("error").to_pylist() == [None, None, "corrupt: x", None, None]
        assert readable.tolist() == [True, True, False, True, True]
        assert pixels[:, 0, 0, 0].tolist() == [0, 255, 250, 1]
        found[kind] = columns
    bright = np.array([False, True, True, False])
    half, full = found[torch.float16]["features"], found[None]["features"]
    np.testing.assert_allclose(half[bright], full[bright], rtol=1e-4, atol=10)
    np.testing.assert_allclose(half[~bright], full[~bright], rtol=1e-2, atol=10)
    assert not np.allclose(half[~bright], full[~bright], rtol=1e-5)  # those were computed in 16 bits
    assert found[torch.float16]["teacher_label"].tolist() == found[None]["teacher_label"].tolist()


@pytest.mark.skipif(not devices.cpu_has_bfloat16(), reason="this machine's cores have no bfloat16")
def test_a_cpu_computes_in_bfloat16_only_where_that_is_asked_for_and_agrees_with_itself() -> None:
    config = load_config(DEMO_CONFIG)
    images = pq.read_table(DEMO / "test.parquet")["image"].to_pylist()[:512]
    pixels = np.stack([p for p in decode_batch(images, pixel_spec(config.teacher))[0] if p is not None])
    weights = (DEMO / "teacher.pt").read_bytes()
    precisions: tuple[Precision, ...] = ("float32", "auto", "bfloat16")
    exact, usual, half = (Teacher(config.teacher, weights, CPU, 1, precision)(pixels) for precision in precisions)
    assert all(torch.equal(a, b) for a, b in zip(exact, usual, strict=True))
    assert not torch.equal(exact[0], half[0])
    assert half[0].dtype == half[1].dtype == torch.float32
    assert (exact[1].argmax(1) == half[1].argmax(1)).float().mean() >= 0.98
    directions = torch.randn(exact[0].shape[1], 5, generator=torch.Generator().manual_seed(0))
    scores = [
        ((features - exact[0].mean(0)) / exact[0].std(0).clamp_min(1e-3)) @ directions for features, _ in (exact, half)
    ]
    for a, b in zip(*(s.T.numpy() for s in scores), strict=True):
        assert spearmanr(a, b).statistic >= 0.999


def test_a_table_without_a_readable_image_has_columns_of_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "assigned_device", lambda: CPU)
    weights = dump_state(new_network("lenet5", TEACHER).state_dict())
    teacher = Keeps(TEACHER, Here(weights), 1)
    table, readable, pixels, columns = teacher.forward(decoded([None, None]))
    assert table.num_rows == 2
    assert not readable.any()
    assert len(pixels) == 0
    assert columns["features"].shape == (0, Teacher(TEACHER, weights, CPU).extractor.channels)
    assert columns["teacher_label"].dtype == np.int32


@pytest.mark.parametrize("cut", [slice(None), slice(1, 4), slice(2, 3)])
def test_pixels_are_found_in_any_part_of_a_column(cut: slice) -> None:
    images: list[Any] = [image(1), None, image(3), image(4), None]
    column = decoded(images).column("pixels")
    expected = [i for i in images[cut] if i is not None]
    part = column.slice(cut.start or 0, len(images[cut]))
    for chunks in (part, pa.chunked_array([part.chunk(0), part.chunk(0)])):
        found = pixel_rows(chunks, SPEC)
        assert np.array_equal(found, np.stack(expected * chunks.num_chunks))
