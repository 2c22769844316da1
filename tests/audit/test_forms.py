"""The page, the CSV file and Label Studio's tasks, out and back; no Ray."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from record_types import faults_of

from pukd_ray.audit.forms import (
    CSV_COLUMNS,
    INTERFACE_XML,
    Example,
    csv_text,
    parse_labels,
    picture,
    read_labels,
    render_page,
    write_fiftyone,
)
from pukd_ray.audit.record import SAMPLE_SCHEMA, audit_id, is_current, save_audit
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import LabelsRecord
from pukd_ray.selection.labels import LABELS_SCHEMA, label_records

IDS = [
    "part-0.parquet#1",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '=HYPERLINK("http://x")',
    "-1,\"a\";b\n'c'",
    "__proto__",
    "{{ 7 * 7 }}",
    "ünï\u2028ćø 🐍",
]
PNG = encode_png(np.zeros((1, 4, 4), np.uint8))


def make_sample(ids: list[str] = IDS) -> pa.Table:
    n = len(ids)
    rows = {
        "image_id": ids,
        "source": [f"/lake/{i}" for i in ids],
        "source_row": list(range(n)),
        "stratum": [int(k >= n // 2) for k in range(n)],
        "stratum_size": [n // 2 if k < n // 2 else 10 * (n - n // 2) for k in range(n)],
        "sampled": [n // 2 if k < n // 2 else n - n // 2 for k in range(n)],
        "inclusion_probability": [1.0 if k < n // 2 else 0.1 for k in range(n)],
        "pu_logit": [1.0] * n,
        "pu_probability": [0.5] * n,
        "selected": [k < n // 2 for k in range(n)],
        "teacher_label": [0] * n,
        "image": [PNG] * n,
    }
    return pa.table(rows, schema=SAMPLE_SCHEMA)


def make_folder(path: Path) -> tuple[RunFolder, str]:
    folder, sample = RunFolder(str(path)), make_sample()
    folder.write_table("audit/sample.parquet", sample)
    design: dict[str, Any] = {"audit": audit_id(sample), "seed": 0, "n_scored": 44, "n_unreadable": 2}
    folder.write_json("audit/design.json", design | {"n_selected": 4, "select_finished": "2026-01-01T00:00:00+00:00"})
    folder.write_json("markers/select.json", {"finished": "2026-01-01T00:00:00+00:00"})
    return folder, design["audit"]


ANSWERS = dict(zip(IDS, ["yes", "yes", "no", "yes", "no", "unsure", "no", "yes"], strict=True))


def from_page(audit: str, labels: dict[str, str]) -> str:
    return json.dumps({"audit": audit, "labels": labels})


def from_csv(audit: str, labels: dict[str, str], separator: str = ",") -> str:
    rows = list(csv.DictReader(io.StringIO(csv_text(make_sample(), audit), newline="")))
    assert all(not row["label"] for row in rows)
    sink = io.StringIO()
    writer = csv.DictWriter(sink, CSV_COLUMNS, delimiter=separator)
    writer.writeheader()
    for row, i in zip(rows, IDS, strict=True):
        writer.writerow(row | {"label": labels.get(i, "")})
    return "\ufeff" + sink.getvalue()


def from_studio(audit: str, labels: dict[str, str]) -> str:
    def annotation(label: str) -> dict[str, Any]:
        choice = {"from_name": "relevant", "to_name": "image", "type": "choices", "value": {"choices": [label]}}
        return {"id": 1, "was_cancelled": False, "result": [choice]}

    tasks = [
        {
            "id": k,
            "data": {"audit": audit, "image_id": i, "image": "data:"},
            "annotations": [annotation(labels[i])] if i in labels else [],
        }
        for k, i in enumerate(IDS)
    ]
    return json.dumps(tasks)


def from_fiftyone(audit: str, labels: dict[str, str]) -> str:
    numbers = {"yes": 0, "no": 1, "unsure": 2}
    named = {f"{audit}-{k:05d}": numbers[labels[i]] if i in labels else None for k, i in enumerate(IDS, 1)}
    return json.dumps({"classes": list(numbers), "labels": named})


FORMATS = {
    "page": from_page,
    "csv": from_csv,
    "csv of a spreadsheet": lambda audit, labels: from_csv(audit, labels, ";"),
    "label studio": from_studio,
    "fiftyone": from_fiftyone,
    "fiftyone without classes": lambda audit, labels: json.dumps(
        {"classes": None, "labels": {f"data/{audit}-{IDS.index(i) + 1}.png": label for i, label in labels.items()}}
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_labels_come_back_from_every_form(tmp_path: Path, name: str) -> None:
    folder, audit = make_folder(tmp_path / "run")
    for labels in (ANSWERS, dict(list(ANSWERS.items())[:3])):
        file = tmp_path / "labels"
        file.write_text(FORMATS[name](audit, labels), encoding="utf-8", newline="")
        assert read_labels(folder, str(file)) == labels


def test_label_studio_takes_the_interface_the_tasks_and_the_annotations(tmp_path: Path) -> None:
    pytest.importorskip("label_studio_sdk", reason="label-studio-sdk is not installed (pip install label-studio-sdk)")
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface(INTERFACE_XML)
    interface.validate()
    for image_id in IDS:
        interface.validate_task({"data": {"audit": "a", "image_id": image_id, "image": picture(PNG)}})
    exported = json.loads(from_studio("a", ANSWERS))
    assert all(interface.validate_annotation(annotation) for task in exported for annotation in task["annotations"])
    (tmp_path / "in.json").write_text(json.dumps(exported))
    Converter(INTERFACE_XML, str(tmp_path)).convert_to_json(
        str(tmp_path / "in.json"), str(tmp_path / "out"), is_dir=False
    )
    assert parse_labels((tmp_path / "out/result.json").read_text(), IDS, "a") == ANSWERS


def test_the_pictures_for_fiftyone_are_named_by_audit_and_number(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_fiftyone(folder, "fedc", [picture(PNG), None, picture(PNG)])
    assert sorted(p.name for p in (tmp_path / "audit/fiftyone/data").iterdir()) == ["fedc-00001.png", "fedc-00003.png"]
    said = folder.read_json("audit/fiftyone/labels.json")
    assert said == {"classes": ["yes", "no", "unsure"], "labels": {"fedc-00001": None, "fedc-00003": None}}
    with Image.open(tmp_path / "audit/fiftyone/data/fedc-00003.png") as opened:
        assert opened.size == (4, 4)


def test_fiftyone_imports_the_pictures_and_exports_labels_that_come_back(tmp_path: Path) -> None:
    pytest.importorskip("fiftyone", reason="fiftyone is not installed (pip install fiftyone)")
    import fiftyone as fo
    from fiftyone.utils.data import (
        FiftyOneImageClassificationDatasetExporter as Exporter,
    )
    from fiftyone.utils.data import (
        FiftyOneImageClassificationDatasetImporter as Importer,
    )

    write_fiftyone(RunFolder(str(tmp_path)), "a", [picture(PNG)] * len(IDS))
    with Importer(dataset_dir=str(tmp_path / "audit/fiftyone")) as samples:
        paths = [path for path, _, label in samples if label is None]
    assert len(paths) == len(IDS)
    with Exporter(export_dir=str(tmp_path / "out"), classes=["yes", "no", "unsure"]) as exporter:
        for path, label in zip(sorted(paths), ANSWERS.values(), strict=True):
            exporter.export_sample(path, fo.Classification(label=label))
    assert parse_labels((tmp_path / "out/labels.json").read_text(), IDS, "a") == ANSWERS


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_another_sample_is_refused(name: str) -> None:
    text = FORMATS[name]("0123456789abcdef", ANSWERS)
    with pytest.raises(RunError, match=r"answers\.x: holds labels of audit '0123456789abcdef', but .* is fedc"):
        parse_labels(text.lstrip("\ufeff"), IDS, "fedc", "answers.x")


def test_unknown_ids_and_labels_are_refused() -> None:
    with pytest.raises(RunError, match="image 'other' is not in the sample"):
        parse_labels(from_page("a", {"other": "yes"}), IDS, "a")
    with pytest.raises(RunError, match="has label 'maybe', not one of yes, no, unsure"):
        parse_labels(from_page("a", {IDS[0]: "maybe"}), IDS, "a")
    with pytest.raises(RunError, match="has label \\['yes'\\]"):
        parse_labels(json.dumps({"audit": "a", "labels": {IDS[0]: ["yes"]}}), IDS, "a")
    head, row, *rest = from_csv("a", {IDS[0]: "yes"}).lstrip("\ufeff").splitlines(keepends=True)
    with pytest.raises(RunError, match="is there twice"):
        parse_labels("".join([head, row, row, *rest]), IDS, "a")


def test_ids_of_digits_come_back_from_a_spreadsheet() -> None:
    rows = "audit,number,image_id,label\na,1,123,yes\na,2,1.23E+18,no\na,3,7,yes\n"
    ids = ["000123", "1230000000000000007", "7"]
    assert parse_labels(rows, ids, "a") == {ids[0]: "yes", ids[1]: "no", "7": "yes"}
    with pytest.raises(RunError, match="image '123' is not in the sample"):
        parse_labels(rows.replace("a,1,", "a,9,"), ids, "a")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"audit": "a", "labels": 3}', "{", "hello", "", "[]", "a,b\n1,2\n"])
def test_other_files_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(RunError, match="labels: ") as caught:
        parse_labels(text, IDS, "a")
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    with pytest.raises(RunError, match="there is no such file"):
        read_labels(folder, str(tmp_path / "nothing.csv"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="no text in UTF-8"):
        read_labels(folder, str(tmp_path / "binary"))
    with pytest.raises(RunError, match="holds no audit: draw one first"):
        read_labels(RunFolder(str(tmp_path / "empty")), str(tmp_path / "binary"))


def test_people_who_disagree_are_unsure() -> None:
    tasks = json.loads(from_studio("a", {IDS[0]: "yes"}))
    tasks[0]["annotations"] += json.loads(from_studio("a", {IDS[0]: "no"}))[0]["annotations"]
    assert parse_labels(json.dumps(tasks), IDS, "a") == {IDS[0]: "unsure"}
    tasks[0]["annotations"][1]["was_cancelled"] = True
    assert parse_labels(json.dumps(tasks), IDS, "a") == {IDS[0]: "yes"}


def test_no_cell_of_the_csv_is_a_formula() -> None:
    for row in csv.reader(io.StringIO(csv_text(make_sample(), "a"), newline="")):
        assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_the_page_holds_foreign_text_as_data_and_asks_for_nothing() -> None:
    page = render_page("<b>run</b>", "ab12", IDS, [picture(PNG)] * len(IDS), [Example("<i>class</i>", ())])
    assert len(re.findall("<script", page)) == 2
    assert "<b>run" not in page
    assert "<i>class" not in page
    assert not re.search("<img src=x", page)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "default-src 'none'" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert [i for i, _ in json.loads(data[1])["images"]] == IDS


def test_pictures_are_whole_upright_and_small_files() -> None:
    sink = io.BytesIO()
    Image.new("RGB", (2000, 1000), "red").save(sink, "TIFF")
    uri = picture(sink.getvalue())
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 40_000
    assert (picture(PNG) or "").startswith("data:image/png;base64,")
    assert picture(b"hello") is picture(None) is None


def test_saved_labels_stand_for_the_images_of_their_strata(tmp_path: Path) -> None:
    folder, audit = make_folder(tmp_path)
    assert not folder.exists("labels")
    record = save_audit(folder, parse_labels(from_page(audit, ANSWERS), IDS, audit))
    assert (record["labelled"], record["unsure"], record["sampled"]) == (7, 1, 8)
    assert record["precision"] == {"value": 0.75, "lower": 0.75, "upper": 0.75, "reason": None}
    labels = folder.read_table(f"labels/{audit}.parquet")
    assert labels.schema.equals(LABELS_SCHEMA)
    rows = {r["image_id"]: r for r in labels.to_pylist()}
    assert {i: r["relevant"] for i, r in rows.items()} == {i: v == "yes" for i, v in ANSWERS.items() if v != "unsure"}
    assert all(r["image"] == PNG for r in rows.values())
    assert [rows[i]["weight"] for i in IDS if i in rows] == [1.0] * 4 + [pytest.approx(40 / 3)] * 3
    (said,) = label_records(folder)
    assert faults_of(said, LabelsRecord) == []
    assert (said["audit"], said["labelled"], said["prior"]) == (audit, 7, record["prior"]["value"])
    assert said["images"] == record["design"]["n_scored"] + record["design"]["n_unreadable"]
    assert is_current(folder, record["design"])
    folder.write_json("markers/select.json", {"finished": "later"})
    assert not is_current(folder, record["design"])


def test_the_id_is_of_the_draw() -> None:
    sample = make_sample()
    assert audit_id(sample) == audit_id(make_sample())
    assert audit_id(sample) != audit_id(make_sample([*IDS[:-1], "other"]))
