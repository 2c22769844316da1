"""`pukd publish`: what Hugging Face's libraries make of the folders that it writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pukd_ray.cli import DEMO_CONFIG
from pukd_ray.commands import main
from pukd_ray.config import SourceConfig
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.sources import list_source
from pukd_ray.networks.teacher import dump_state
from pukd_ray.networks.zoo import build_network
from pukd_ray.preflight import load_config, to_yaml
from pukd_ray.run.folder import SELECTED_SCHEMA, RunFolder

NAMES = ["T-shirt", "pullover", "<b>coat</b>", "shirt", "bag: a | b"]
PNGS = [encode_png(np.full((1, 4, 4), 10 * i, np.uint8)) for i in range(6)]


def write_run(path: Path, arch: str, *, student: bool = True) -> RunFolder:
    """As much of a finished run as is published: 6 images in two files."""
    config = load_config(DEMO_CONFIG, {"output": str(path), "student.arch": arch, "name": "clothes: all"})
    run = RunFolder(str(path))
    run.write_text("config.yaml", to_yaml(config))
    run.finish("score", {}, 1.0, {"n_corpus": 40})
    run.finish("select", {}, 1.0, {})
    estimated = {"precision": 0.9111, "precision_interval": [0.871, 0.951], "recall": None, "recall_interval": None}
    run.write_json(
        "selection.json",
        {"n_selected": 6, "n_duplicates": 2, "class_counts": [2, 1, 1, 1, 1], "estimated": estimated, "n_scored": 38},
    )
    run.write_json("selector/meta.json", {"classes": NAMES, "n_positives": 30})
    run.write_json("selector/prior.json", {"value": 0.25, "trust": "low", "reasons": ["P differs"]})
    rows = [
        {
            "image_id": f"part-0.parquet#{i}", "source": "s3://secret-lake/part-0.parquet", "source_row": i,
            "pu_logit": 1.0, "pu_probability": 0.75, "teacher_label": i % 5, "teacher_confidence": 0.5,
            "image": PNGS[i],
        }
        for i in range(6)
    ]  # fmt: skip
    for part, some in enumerate((rows[:4], rows[4:])):
        run.write_table(f"selected/{part:05d}.parquet", pa.Table.from_pylist(some, schema=SELECTED_SCHEMA))
    if student:
        size, channels = (32, 3) if arch.startswith("timm") else (28, 1)
        network = build_network(arch, num_classes=5, channels=channels, input_size=size)
        run.write_bytes("student/student.pt", dump_state(network.state_dict()))
        shown = {"input_size": size, "channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}
        record: dict[str, Any] = {"arch": arch, "num_classes": 5, "classes": NAMES, "teacher": "lenet5", "steps": 9}
        run.write_json("student/meta.json", record | {"preprocessing": shown | {"resize": "crop"}, "images": 36})
        run.finish("distill", {}, 1.0, {})
    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("published")
    write_run(tmp / "run", "lenet5_half")
    assert main(["publish", str(tmp / "run"), str(tmp / "hub")]) == 0
    return tmp


def test_the_datasets_library_opens_the_selection(published: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
    found = datasets.load_dataset(str(published / "hub/dataset"), cache_dir=str(published / "cache"))
    assert list(found) == ["train"]
    train = found["train"]
    assert train.features["label"].names == NAMES
    assert isinstance(train.features["image"], datasets.Image)
    assert train["label"][:] == [0, 1, 2, 3, 4, 0]
    assert [int(np.asarray(image)[0, 0]) for image in train["image"][:]] == [0, 10, 20, 30, 40, 50]
    assert train["image_id"][3] == "part-0.parquet#3"
    assert train.column_names == ["image", "label", "image_id", "pu_probability", "teacher_confidence"]


def test_this_package_reads_it_too(published: Path) -> None:
    form, files, left_out = list_source(SourceConfig(uri=str(published / "hub/dataset")), "corpus")
    assert (form, len(list(files)), dict(left_out)) == ("parquet", 2, {})


def test_the_hub_library_reads_the_cards(published: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="extra `hf` is not installed")
    card = hub.DatasetCard.load(published / "hub/dataset/README.md")
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert card.data.to_dict()["dataset_info"]["splits"] == [{"name": "train", "num_examples": 6}]
    assert card.data.license is None
    assert card.data.pretty_name == "clothes: all"
    model = hub.ModelCard.load(published / "hub/model/README.md")
    assert (model.data.license, model.data.pipeline_tag) == (None, "image-classification")


def test_the_cards_say_what_was_selected_from_what_and_how_well(published: Path) -> None:
    text = (published / "hub/dataset/README.md").read_text()
    for part in (
        "# license: to be stated by the owner",
        "6 images that were selected from 40 unlabelled ones",
        "`positive`: ",
        "trained on 30 labelled images",
        "| precision, estimated | 0.9111 | 0.871 to 0.951 |",
        "| recall, estimated | cannot tell |  |",
        "Trust in the estimates: low (P differs)",
        "| &lt;b&gt;coat&lt;/b&gt; | 1 |",
        f"`{load_config(DEMO_CONFIG).corpus[0].uris[0]}`",
        r"| bag: a \| b | 1 |",
    ):
        assert part in text, part
    assert "secret-lake" not in text
    assert "<b>" not in text.split("---")[2]


def test_the_model_is_loaded_as_its_card_says(published: Path) -> None:
    text = (published / "hub/model/README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(published / "hub/model"))
    names: dict[str, Any] = {}
    exec(code, names)
    state = load_file(published / "hub/model/model.safetensors")
    assert {k: v.tolist() for k, v in names["model"].state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert names["model"](torch.zeros(1, 1, 28, 28)).shape == (1, 5)


@pytest.mark.parametrize("arch", ["resnet10t", "test_vit"])
def test_timm_opens_a_student_of_its_own(tmp_path: Path, arch: str) -> None:
    timm = pytest.importorskip("timm", reason="extra `timm` is not installed")
    run = write_run(tmp_path / "run", f"timm:{arch}")
    assert main(["publish", run.uri, str(tmp_path / "hub")]) == 0
    text = (tmp_path / "hub/model/README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(tmp_path / "hub/model"))
    names: dict[str, Any] = {}
    exec(code, names)
    wanted = torch.load(io.BytesIO(run.read_bytes("student/student.pt")), weights_only=True)
    state = names["model"].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    data = timm.data.resolve_model_data_config(names["model"])
    assert [list(data[key]) for key in ("input_size", "mean", "std")] == [[3, 32, 32], [0.5] * 3, [0.25] * 3]
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bilinear")
    assert names["model"].pretrained_cfg["label_names"] == NAMES
    shown = names["transform"](Image.new("RGB", (40, 60)))
    assert names["model"](shown[None]).shape == (1, 5)


def test_a_run_without_a_student_has_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", "lenet5_half", student=False)
    assert main(["publish", run.uri, str(tmp_path / "hub")]) == 0
    assert not (tmp_path / "hub/model").exists()
    assert "6 images, for datasets.load_dataset" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "/hub"])
def test_a_file_is_no_folder_to_publish_into(
    published: Path, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["publish", str(published / "run"), f"{tmp_path}/file{below}"]) == 2
    assert capsys.readouterr().err.startswith(f"arguments: FOLDER {tmp_path}/file{below} cannot be written into, ")


def test_nothing_is_overwritten(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(published / "run"), str(published / "hub")]) == 1
    assert f"failed: {published}/hub/dataset is there already" in capsys.readouterr().err
    write_run(tmp_path / "run", "lenet5_half")
    (tmp_path / "run/markers/select.json").unlink()
    assert main(["publish", str(tmp_path / "run"), str(tmp_path / "hub")]) == 1
    assert "nothing is selected yet" in capsys.readouterr().err
