"""The student in other formats says what PyTorch says; the documented lines run it."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from record_types import faults_of
from synthetic import labelled, write_teacher

from pukd_ray import load_student
from pukd_ray.config import NEEDED_BY_FORMATS, ExportConfig, ExportFormat, TeacherConfig
from pukd_ray.corpus.pixels import PixelSpec, decode
from pukd_ray.errors import RunError
from pukd_ray.export import stage
from pukd_ray.export.formats import FORMATS, trace
from pukd_ray.networks.teacher import dump_safetensors, dump_state, new_network
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import ExportRecord

PAGE = Path(__file__).parents[2] / "docs/export.md"
RGB = {"input_size": 32, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resize": "crop"}
GRAY = {"input_size": 16, "channels": 1, "mean": [0.3], "std": [0.3], "resize": "crop"}


def write_student(folder: RunFolder, arch: str, preprocessing: dict[str, Any], weights: bytes, classes: int) -> None:
    folder.write_bytes("student/student.pt", weights)
    meta = {"arch": arch, "num_classes": classes, "classes": [f"class {k}" for k in range(classes)]}
    folder.write_json(
        "student/meta.json", meta | {"preprocessing": preprocessing, "teacher": "x", "steps": 1, "images": 1}
    )


def random_network(arch: str) -> torch.nn.Module:
    """With BatchNorm that does something: exporters fold it into convolutions."""
    torch.manual_seed(0)
    network = new_network(arch, TeacherConfig(arch=arch, weights="w", num_classes=5, **RGB))
    network.train()(torch.randn(64, 3, 32, 32) * 2 + 1)
    return network.eval()


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run's folder with a ResNet of random weights."""
    folder = RunFolder(str(tmp_path_factory.mktemp("colour")))
    write_student(folder, "resnet20_cifar", RGB, dump_state(random_network("resnet20_cifar").state_dict()), 5)
    return folder


def pixels_like(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, shape[0], 4, 4))
    return np.kron(coarse, np.ones((shape[1] // 4, shape[2] // 4))).astype(np.uint8)


def test_every_format_of_the_config_has_an_entry() -> None:
    assert FORMATS.keys() == NEEDED_BY_FORMATS.keys() == set(get_args(ExportFormat))


def available() -> list[ExportFormat]:
    """Float formats whose packages are here: CI has not the extra executorch."""
    floats = [name for name in get_args(ExportFormat) if FORMATS[name].exact]
    return [name for name in floats if all(find_spec(package) for package in NEEDED_BY_FORMATS[name])]


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_float_file_says_what_pytorch_says(kind: Any, colour: RunFolder) -> None:
    names = available()
    check = stage.CheckImages(pixels_like(150, (3, 32, 32), 1), np.full(150, -1))
    settings = ExportConfig(formats=names, input=kind)
    record = stage.write_files(colour, settings, check.pixels[:8], check)
    assert faults_of(record, ExportRecord, "export.json") == []
    assert record["role"] == "selected"
    for name in names:
        file = record["files"][name]
        assert file["agreement"] == 1.0
        assert file["largest_difference"] < 1e-4
        assert file["top1"] is None
        assert file["bytes"] == len(colour.read_bytes(file["file"]))
        assert 0 < file["milliseconds"] < 1000
    # By the files alone, one image and many, against the student that users load.
    student = load_student(f"{colour.root}/student")
    images = [encoded(p) for p in check.pixels[:3]]
    expected = student(images).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01  # images matter
    for name in names:
        run = FORMATS[name].load(colour.read_bytes(record["files"][name]["file"]))
        np.testing.assert_allclose(run(check.pixels[:3].astype(kind)), expected, atol=1e-5)
        np.testing.assert_allclose(run(check.pixels[:1].astype(kind)), expected[:1], atol=1e-5)


def encoded(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(sink, "PNG")
    return sink.getvalue()


def test_int8_is_smaller_and_nearly_as_good(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    write_teacher(tmp_path / "teacher.pt")
    folder = RunFolder(str(tmp_path / "run"))
    write_student(folder, "lenet5", GRAY, (tmp_path / "teacher.pt").read_bytes(), 4)
    table, spec = labelled(200, 5), PixelSpec(16, 1, "crop")
    pixels = np.stack([decode(image, spec) for image in table.column("image").to_pylist()])
    check = stage.CheckImages(pixels[:150], np.array(table.column("label").to_pylist())[:150])
    record = stage.write_files(folder, ExportConfig(formats=["onnx_int8", "onnx"]), pixels[150:], check)
    int8, whole = record["files"]["onnx_int8"], record["files"]["onnx"]
    assert record["role"] == "test"
    assert record["calibration_images"] == 50
    assert record["pytorch"]["top1"] == whole["top1"] == 1.0
    assert int8["agreement"] > 0.95
    assert int8["top1"] is not None
    assert int8["top1"] > 0.95
    assert 0 < int8["largest_difference"] > whole["largest_difference"]
    assert int8["bytes"] < 0.5 * whole["bytes"]


def test_a_file_that_says_something_else_stops_the_run(colour: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    check = stage.CheckImages(pixels_like(4, (3, 32, 32), 1), np.full(4, -1))
    monkeypatch.setattr(stage, "GAP", -1.0)
    colour.delete_folder("export")
    with pytest.raises(
        RunError, match=r"export: probabilities of student\.pt2 differ .* leave it out of export\.formats"
    ):
        stage.write_files(colour, ExportConfig(formats=["torch"]), check.pixels, check)
    assert not colour.exists("export/student.pt2")


@pytest.mark.parametrize("exact", [True, False], ids=["float", "int8"])
def test_a_file_that_says_nothing_stops_the_run(
    exact: bool, colour: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_data: bytes) -> Any:
        return lambda pixels: np.full((len(pixels), 5), np.nan, np.float32)

    check = stage.CheckImages(pixels_like(4, (3, 32, 32), 1), np.full(4, -1))
    monkeypatch.setitem(FORMATS, "torch", replace(FORMATS["torch"], load=silent, exact=exact))
    colour.delete_folder("export")
    with pytest.raises(RunError, match=r"student\.pt2 differ by up to nan from PyTorch's"):
        stage.write_files(colour, ExportConfig(formats=["torch"]), check.pixels, check)
    assert not colour.exists("export/student.pt2")


class Undecided(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_a_network_without_a_graph_is_named() -> None:
    with pytest.raises(RunError, match=r"torch\.export cannot make a graph of student\.arch \(.*choose another"):
        trace(Undecided(), np.zeros((2, 1, 4, 4), np.float32), np.zeros((2, 1, 4, 4), np.float32), {})


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_documented_lines_run_it(
    colour: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    from PIL import ImageOps

    pixels = pixels_like(1, (3, 32, 32), 9)
    check = stage.CheckImages(pixels, np.array([-1]))
    stage.write_files(colour, ExportConfig(formats=["onnx"]), pixels, check)
    Path(colour.root, "photo.jpg").write_bytes(encoded(pixels[0]))
    monkeypatch.chdir(colour.root)
    code = blocks()[0]
    assert len(code.splitlines()) == 5
    names = {"json": json, "np": np, "onnxruntime": onnxruntime, "Image": Image, "ImageOps": ImageOps}
    exec(code, names)
    student = load_student(f"{colour.root}/student")
    expected = student([encoded(pixels[0])])[0]
    np.testing.assert_allclose(names["probabilities"][0], expected, atol=1e-5)
    assert capsys.readouterr().out.strip() == student.classes[int(expected.argmax())]


def test_the_documented_lines_load_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import OrderedDict

    import safetensors
    import torchvision

    network = random_network("mnasnet0_5")
    (tmp_path / "student").mkdir()
    about = {"arch": "mnasnet0_5", "num_classes": 5}
    (tmp_path / "student/student.safetensors").write_bytes(dump_safetensors(network.state_dict(), about))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "OrderedDict": OrderedDict,
        "json": json,
        "safetensors": safetensors,
        "torchvision": torchvision,
    }
    exec(blocks()[1], names)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(names["network"].eval()(images), network(images))
