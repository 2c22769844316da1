"""Data sets as Hugging Face keeps them: splits, columns and class names as found, and `hf://`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import serve_dataset
from small_files import units_of

from pukd_ray.config import ConfigError, SourceConfig, TeacherConfig
from pukd_ray.corpus.huggingface import folders_below_split, front_matter, named_columns, split_by_name, splits_of
from pukd_ray.corpus.labelled import LabelError, Labelled, index_labelled
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.plan import measure_units
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.sources import list_source
from pukd_ray.run.folder import changed_inputs

ROOT = Path(__file__).parents[2]
PNG = encode_png(np.zeros((1, 4, 4), np.uint8))
NAMES = ["cat", "dog", "eel"]
README = """---
dataset_info:
  features:
  - name: img
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {'0': cat, '1': dog, '2': eel}
  splits: [{name: train, num_examples: 4}, {name: test, num_examples: 2}]
configs:
- config_name: plain
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
# Pets
"""


def write_parquet(path: Path, labels: list[int], *, image: str = "img", names: list[str] | None = NAMES) -> None:
    """As the `datasets` library writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features: dict[str, Any] = {image: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    cells = [{"bytes": PNG, "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({image: cells, "label": pa.array(labels, pa.int64())})
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    write_parquet(folder / "data/train-00000-of-00002.parquet", [0, 1])
    write_parquet(folder / "data/train-00001-of-00002.parquet", [2, 0])
    write_parquet(folder / "data/test-00000-of-00001.parquet", [1, 2])
    (folder / "README.md").write_text(README)
    return folder


def relatives(**source: Any) -> list[str]:
    return [file.relative for file in list_source(SourceConfig(**source), "test")[1]]


def test_a_split_is_read_by_its_name(pets: Path) -> None:
    assert relatives(uri=str(pets), split="train") == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert relatives(uri=str(pets), split="test") == ["data/test-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("split", "fault"),
    [
        (None, "test.split: is needed by a data set of Hugging Face with several splits: train, test"),
        ("dev", "test.split: there is no 'dev': train, test"),
    ],
)
def test_splits_that_cannot_be_told_are_named(pets: Path, split: str | None, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        relatives(uri=str(pets), split=split)
    assert caught.value.faults == [fault]


def test_a_folder_that_is_no_such_data_set_is_read_whole(pets: Path) -> None:
    (pets / "README.md").write_text("# Pets\n---\nno front matter\n---\n")
    assert len(relatives(uri=str(pets))) == 3
    assert len(relatives(uri=str(pets), split="train")) == 2  # by the files' names
    (pets / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(relatives(uri=str(pets))) == 3


def test_a_split_needs_a_folder(pets: Path) -> None:
    file = f"{pets}/data/test-00000-of-00001.parquet"
    for uri in (file, f"{pets}/data/*.parquet", [str(pets), file]):
        with pytest.raises(ConfigError) as caught:
            relatives(uri=uri, split="train")
        named = uri if isinstance(uri, str) else file
        assert caught.value.faults == [
            f"test.split: needs the folder of a data set, and {named} is a file or a pattern: name its folder"
        ]


@pytest.mark.parametrize("card", [True, False])
@pytest.mark.parametrize("above", ["", "data/"])
def test_the_label_in_a_folder_of_images_is_below_the_split(tmp_path: Path, above: str, card: bool) -> None:
    for place in ("train/cat", "train/dog/1", "train", "test/cat"):
        (tmp_path / above / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / above / place / "1.png").write_bytes(PNG)
    if card:
        patterns = f"{{train: '{above}train/**', test: '{above}test/**'}}"
        (tmp_path / "README.md").write_text(f"---\nconfigs: [{{config_name: a, data_files: {patterns}}}]\n---\n")
    source = SourceConfig(uri=str(tmp_path), split="train")
    rows = [row for unit in units_of(source) for row in read_rows(unit, source)]
    assert [(row.image_id, row.label) for row in rows] == [
        (f"{above}train/1.png", above[:-1] or "train"),
        (f"{above}train/cat/1.png", "cat"),
        (f"{above}train/dog/1/1.png", "dog"),
    ]


@pytest.mark.parametrize(
    ("folders", "split", "left"),
    [
        ("val/cat", "validation", "cat"),
        ("pets/Train/cat/1", "pets/train", "cat/1"),
        ("cat/train/1", "train", "cat/train/1"),
        ("data/cat/1", "train", "data/cat/1"),
        ("data", "train", "data"),
        ("mine/cat", "mine", "cat"),
    ],
)
def test_folders_below_a_split(folders: str, split: str, left: str) -> None:
    assert "/".join(folders_below_split(tuple(folders.split("/")), split)) == left


def test_a_data_set_with_one_split_needs_no_name(pets: Path) -> None:
    (pets / "data/test-00000-of-00001.parquet").unlink()
    assert len(relatives(uri=str(pets))) == 2


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("data/*.parquet", {"train": ["data/a.parquet", "data/b.parquet"]}),
        (["data/a.parquet", "x/**"], {"train": ["data/a.parquet", "x/test.parquet"]}),
        ({"one": "x/*", "two": ["data/b*"]}, {"one": ["x/test.parquet"], "two": ["data/b.parquet"]}),
        ([{"split": "s", "path": ["data/b.parquet"]}], {"s": ["data/b.parquet"]}),
        (None, {"train": ["data/a.parquet", "data/b.parquet"], "test": ["x/test.parquet"]}),
    ],
)  # fmt: skip
def test_data_files_are_given_in_many_ways(files: Any, splits: dict[str, list[str]]) -> None:
    names = ["data/a.parquet", "data/b.parquet", "x/test.parquet"]
    assert splits_of({"configs": [{"config_name": "c", "data_files": files}]}, names) == splits


def test_several_configs_have_splits_of_their_own() -> None:
    card = {"configs": [{"config_name": "a", "data_dir": "a"}, {"config_name": "b", "data_files": "b/*"}]}
    names = ["a/train.parquet", "a/test.parquet", "b/x.parquet"]
    assert splits_of(card, names) == {
        "a/train": ["a/train.parquet"], "a/test": ["a/test.parquet"], "b/train": ["b/x.parquet"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/unsupervised-00000-of-00001-abc.parquet", "unsupervised"),
        ("validation/0.parquet", "validation"),
        ("my-dev_set.parquet", "validation"),
        ("testament.parquet", "train"),
        ("plain_text/test-00000-of-00001.parquet", "test"),
    ],
)
def test_names_of_files_tell_splits(name: str, split: str) -> None:
    assert split_by_name(name) == split


@pytest.mark.parametrize("text", ["", "no", "---\n: :\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n---\n"])
def test_other_readmes_say_nothing(text: str) -> None:
    assert front_matter(text) is None


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("names", [NAMES, None])
def test_the_column_of_images_is_found(tmp_path: Path, names: list[str] | None) -> None:
    write_parquet(tmp_path / "a.parquet", [0, 1], names=names)
    source = SourceConfig(uri=str(tmp_path), label_column="label")
    (unit,) = [*_units(source)]
    rows = list(read_rows(unit, source))
    assert [(row.image, row.label) for row in rows] == [(PNG, 0), (PNG, 1)]


def _units(source: SourceConfig) -> list[Any]:
    return measure_units({"test": (source,)}, list_inputs({"test": (source,)}).table, print)


def test_what_the_config_names_is_never_replaced() -> None:
    features = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["a"]}, "x": 3}
    schema = pa.schema([(name, pa.binary()) for name in ("photo", "kind", "img")])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    source = SourceConfig(uri="u", label_column="label")
    found = named_columns(schema, source)
    assert (found.image_column, found.label_column) == ("photo", "kind")
    given = SourceConfig(uri="u", image_column="picture")
    assert named_columns(schema, given) == given
    assert named_columns(schema.remove_metadata(), source).image_column == "img"
    broken = schema.with_metadata({"huggingface": "[1"})
    assert named_columns(broken, source).image_column == "img"


def index(source: SourceConfig, classes: tuple[str, ...] | None, num_classes: int = 3) -> Labelled:
    teacher = TeacherConfig(
        arch="lenet5", weights="w", num_classes=num_classes, classes=classes, input_size=28, mean=[0.5] * 3,
        std=[0.5] * 3,
    )  # fmt: skip
    return index_labelled("test", _units(source), (source,), teacher)


def labels(labelled: Labelled) -> list[int]:
    return [k for request in labelled.requests if request.labels is not None for k in request.labels.tolist()]


@pytest.mark.usefixtures("ray_cluster")
def test_class_names_of_the_metadata_count_by_name(pets: Path) -> None:
    train = SourceConfig(uri=str(pets), split="train")
    assert labels(index(train, ("eel", "dog", "cat"))) == [2, 1, 0, 2]
    # Without names of the teacher's, integers are its indices, and have these names.
    found = index(train, None)
    assert (labels(found), found.classes) == ([0, 1, 2, 0], ("cat", "dog", "eel"))
    # Names that the teacher does not know at all say nothing of its classes.
    assert labels(index(train, ("a", "b", "c"))) == [0, 1, 2, 0]
    assert index(train, None, num_classes=5).classes is None
    with pytest.raises(LabelError, match=r"label 'eel' is not in teacher\.classes"):
        index(train, ("dog", "cat", "fox"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_label_map_takes_names_and_numbers(pets: Path) -> None:
    by_name = SourceConfig(uri=str(pets), split="train", label_map={"cat": 1, "eel": 0})
    found = index(by_name, None, num_classes=2)
    assert (labels(found), found.left_out, found.classes) == ([1, 0, 1], 1, None)
    by_number = SourceConfig(uri=str(pets), split="train", label_map={"0": "dog", "1": "cat"})
    assert labels(index(by_number, ("cat", "dog", "eel"))) == [1, 0, 1]


def test_relevant_labels_take_names_and_numbers(pets: Path) -> None:
    for wanted in (["cat", "eel"], [0, 2], ["0", "eel"]):
        source = SourceConfig(uri=str(pets), split="train", relevant_labels=wanted)
        assert [row.relevant for unit in units_of(source) for row in read_rows(unit, source)] == [
            *(True, False, True, True)
        ]


def test_a_run_of_an_earlier_version_is_not_stale() -> None:
    old, new = {"corpus": [{"uri": "u"}], "seed": 0}, {"corpus": [{"uri": "u", "split": None}], "seed": 0}
    assert changed_inputs(old, new) == []
    assert changed_inputs(old, {"corpus": [{"uri": "u", "split": "train"}], "seed": 0}) == ["corpus"]


READ = """
import json, sys
from pukd_ray.config import SourceConfig
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.plan import measure
from pukd_ray.corpus.sources import list_source
from pukd_ray.corpus.units import Owner
from pukd_ray.corpus.reading import read_rows
source = SourceConfig(uri=sys.argv[1], split="train", label_column="label")
form, files, _ = list_source(source, "corpus")
owner, form = Owner("corpus", 0, form), FORMATS[form]
units = [u for f in files for u in form.cut(owner, [(f, measure(f, form.name, source), f.relative)])]
rows = [row for unit in units for row in read_rows(unit, source)]
names = form.label_names(units[0], source)
print(json.dumps([[[r.image_id, r.source, r.label, len(r.image), r.error] for r in rows], names]))
"""


@pytest.mark.parametrize("revision", ["", "@main"])
def test_hf_paths_are_read_through_the_hubs_own_filesystem(pets: Path, revision: str) -> None:
    pytest.importorskip("huggingface_hub", reason="extra `hf` is not installed")
    with serve_dataset("me/pets", pets) as hub:
        uri = f"hf://datasets/me/pets{revision}"
        environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", READ, uri], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr
    rows, names = json.loads(done.stdout)
    first = "data/train-00000-of-00002.parquet"
    assert rows[0] == [f"{first}#0", f"{uri}/{first}", 0, len(PNG), None]
    assert [row[2] for row in rows] == [0, 1, 2, 0]
    assert names == NAMES
