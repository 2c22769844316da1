"""The four ways to label a sample, and back: a page of its own, a CSV file, Label Studio, FiftyOne.

Images are shown in random order and without scores. Image ids are foreign text: they are data in all four.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa
import ray
from markupsafe import Markup
from PIL import Image

from pukd_ray.audit.record import Label, load_sample
from pukd_ray.config import RunConfig
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.pixels import PixelSpec, Unreadable, decode, encode_png
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.stored_units import read_units
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.runtime.templates import load_templates
from pukd_ray.storage import open_storage, read_bytes

PAGE = "audit/label.html"
CSV = "audit/labels.csv"
TASKS = "audit/label_studio.json"
INTERFACE = "audit/label_studio.xml"
FIFTYONE = "audit/fiftyone"
"""A FiftyOneImageClassificationDataset: `data/<audit>-<number>.png` and `labels.json`."""

MAX_SIDE = 320  # of a picture to label, pixels: 300 JPEGs of it are a page of about 10 MB
PNG_SIDE = 96  # below, JPEG would spoil what little there is
WRITE_THREADS = 16
EXAMPLES = 200  # of P on the page
EXAMPLES_PER_CLASS = 4

CSV_COLUMNS = ("audit", "number", "image_id", "source", "source_row", "label")
LABELS: tuple[Label, ...] = get_args(Label)

INTERFACE_XML = """<View>
  <Header value="Is this image relevant?"/>
  <Image name="image" value="$image"/>
  <Choices name="relevant" toName="image" choice="single-radio" showInline="true" required="true">
    <Choice value="yes" hotkey="y"/>
    <Choice value="no" hotkey="n"/>
    <Choice value="unsure" hotkey="u"/>
  </Choices>
</View>
"""


@dataclass(frozen=True)
class Example:
    """One class of the teacher with pictures of it from P."""

    name: str
    pictures: tuple[str, ...]
    """data: URIs."""


def write_forms(folder: RunFolder, config: RunConfig, sample: pa.Table, audit: str) -> None:
    """Write the page, the CSV file, and Label Studio's tasks and labelling interface."""
    ids = sample.column("image_id").to_pylist()
    pictures = [picture(data) for data in sample.column("image").to_pylist()]
    examples: list[Example] = ray.get(_examples.remote(folder, config))
    folder.write_text(PAGE, render_page(config.name, audit, ids, pictures, examples))
    folder.write_text(CSV, csv_text(sample, audit))
    tasks = [{"data": {"audit": audit, "image_id": i, "image": p or ""}} for i, p in zip(ids, pictures, strict=True)]
    folder.write_text(TASKS, json.dumps(tasks))
    folder.write_text(INTERFACE, INTERFACE_XML)
    write_fiftyone(folder, audit, pictures)


def write_fiftyone(folder: RunFolder, audit: str, pictures: Sequence[str | None]) -> None:
    """The same pictures as files, without labels; what cannot be shown has none."""
    named: dict[str, bytes] = {}
    for number, shown in enumerate(pictures, 1):
        if shown is not None:
            header, _, data = shown.partition(",")
            kind = header.partition("/")[2].partition(";")[0]
            named[f"{audit}-{number:05d}.{kind}"] = b64decode(data)
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        list(pool.map(lambda file: folder.write_bytes(f"{FIFTYONE}/data/{file[0]}", file[1]), named.items()))
    labels = {"classes": list(LABELS), "labels": dict.fromkeys(name.rpartition(".")[0] for name in named)}
    folder.write_json(f"{FIFTYONE}/labels.json", labels)


# -- pictures ---------------------------------------------------------------------------------------------------


def picture(data: bytes | None) -> str | None:
    """data: URI of an encoded image as a person should see it: upright, whole, in colour; None if it has no pixels."""
    try:
        with Image.open(io.BytesIO(data or b"")) as opened:  # the header alone
            side = min(MAX_SIDE, max(opened.size))
        pixels = decode(data, PixelSpec(side, 3, "pad"))
    except (Unreadable, OSError, ValueError, Image.DecompressionBombError):
        return None
    if side <= PNG_SIDE:
        return "data:image/png;base64," + b64encode(encode_png(pixels)).decode()
    sink = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(sink, "JPEG", quality=88)
    return "data:image/jpeg;base64," + b64encode(sink.getvalue()).decode()


@ray.remote(num_cpus=IO_CPUS)
def _examples(folder: RunFolder, config: RunConfig) -> list[Example]:
    """The first images of P of each class, fewer where there are many classes."""
    units = read_units(folder)
    sources = sources_by_role(config)["positives"]
    labelled = index_labelled("positives", units, sources, config.teacher)
    classes = config.teacher.num_classes
    each = max(1, min(EXAMPLES_PER_CLASS, EXAMPLES // classes))
    found: list[list[str]] = [[] for _ in range(classes)]
    wanted = [each if k < EXAMPLES else 0 for k in range(classes)]
    for request in labelled.requests:
        if request.positions is None or request.labels is None:
            continue
        chosen = []
        for i, k in enumerate(request.labels.tolist()):
            if wanted[k]:
                wanted[k] -= 1
                chosen.append(i)
        if not chosen:
            continue
        # The reader goes by position in the unit, whatever order it was asked in.
        chosen.sort(key=lambda i, at=request.positions: at[i])  # type: ignore[misc]
        part = ReadRequest(request.unit, request.positions[chosen], request.labels[chosen])
        images = [
            image
            for block in read_blocks(part, sources[part.unit.source])
            for image in block.column("image").to_pylist()
        ]
        for k, image in zip(request.labels[chosen].tolist(), images, strict=True):
            if (shown := picture(image)) is not None:
                found[k].append(shown)
    names = labelled.classes or config.teacher.class_names or [f"class {k}" for k in range(classes)]
    return [Example(name, tuple(pictures)) for name, pictures in zip(names, found, strict=True)]


# -- forms ------------------------------------------------------------------------------------------------------


def render_page(
    name: str, audit: str, ids: Sequence[str], pictures: Sequence[str | None], examples: Sequence[Example]
) -> str:
    """The page as HTML text that refers to nothing outside itself, and runs no script but its own."""
    script = files("pukd_ray.audit").joinpath("page.js").read_text(encoding="utf-8")
    return (
        load_templates("audit")
        .get_template("page.html.j2")
        .render(
            name=name,
            data={"audit": audit, "images": [list(pair) for pair in zip(ids, pictures, strict=True)]},
            count=len(ids),
            examples=examples,
            script=Markup(script),
            script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def csv_text(sample: pa.Table, audit: str) -> str:
    """One row per image, `label` empty."""
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerow(CSV_COLUMNS)
    for number, row in enumerate(sample.select(["image_id", "source", "source_row"]).to_pylist(), 1):
        writer.writerow([audit, number, _as_text(row["image_id"]), _as_text(row["source"]), row["source_row"], ""])
    return sink.getvalue()


def _as_text(value: str) -> str:
    """What a spreadsheet does not run as a formula."""
    return "'" + value if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


# -- and back ---------------------------------------------------------------------------------------------------


def read_labels(folder: RunFolder, path: str) -> dict[str, Label]:
    """Labels by image id from a file that the page saved, the CSV file, Label Studio's JSON export, or the
    `labels.json` of a FiftyOneImageClassificationDataset.

    Some or all. RunError naming the file if it is none of these, of another sample, or has unknown ids or labels.
    """
    sample, design = load_sample(folder)
    try:
        text = read_bytes(*open_storage(path)).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise RunError(f"{path}: there is no such file: name the one with the labels") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is no text in UTF-8: save it as such") from error
    return parse_labels(text, sample.column("image_id").to_pylist(), design["audit"], path)


def parse_labels(text: str, ids: Sequence[str], audit: str, path: str = "labels") -> dict[str, Label]:
    """Labels in `text` of the sample `audit` with image ids `ids`, in the order of the sample; see `read_labels`."""
    found = _read_csv(text, ids, path) if not text.lstrip().startswith(("{", "[")) else _read_json(text, ids, path)
    known = set(ids)
    labels: dict[str, Label] = {}
    for of_audit, image_id, value in found:
        if of_audit != audit:
            raise RunError(
                f"{path}: holds labels of audit {of_audit!r}, but the run folder's is {audit}: name the file that was "
                "made for this one, or the config of the other run"
            )
        if image_id not in known:
            raise RunError(f"{path}: image {image_id!r} is not in the sample: leave that line out")
        label = next((known for known in LABELS if known == value), None)
        if label is None:
            raise RunError(f"{path}: image {image_id!r} has label {value!r}, not one of {', '.join(LABELS)}")
        if image_id in labels:
            raise RunError(f"{path}: image {image_id!r} is there twice: leave one of them")
        labels[image_id] = label
    if not labels:
        raise RunError(f"{path}: no image is labelled: label some, in the order shown, and save")
    return labels


_Found = list[tuple[Any, Any, Any]]
"""(audit, image id, label), as the file has them."""


def _read_csv(text: str, ids: Sequence[str], path: str) -> _Found:
    found: _Found = []
    sample = {_as_text(image_id) for image_id in ids} | {*ids}
    # A spreadsheet may separate by semicolons.
    separator = ";" if text.partition("\n")[0].count(";") >= len(CSV_COLUMNS) - 1 else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    if missing := {"audit", "number", "image_id", "label"} - set(reader.fieldnames or ()):
        raise RunError(
            f"{path}: is neither a file of the page, nor a JSON export of Label Studio or FiftyOne, nor the CSV file "
            f"(no column {sorted(missing)[0]}): name the one with the labels"
        )
    for row in reader:
        if not (value := (row["label"] or "").strip().lower()):
            continue
        image_id = row["image_id"]
        number = row["number"] or ""
        if number.isdecimal() and 1 <= int(number) <= len(ids):
            shown = ids[int(number) - 1]
            # A spreadsheet takes ids of digits for numbers: 000123 becomes 123.
            image_id = shown if image_id == _as_text(shown) or image_id not in sample else image_id
        found.append((row["audit"], image_id, {"y": "yes", "n": "no", "u": "unsure"}.get(value, value)))
    return found


def _read_json(text: str, ids: Sequence[str], path: str) -> _Found:
    try:
        content = json.loads(text)
        if isinstance(content, dict) and "classes" in content:
            return list(_of_fiftyone(content["classes"], content["labels"], ids))
        if isinstance(content, dict):  # of the page
            return [(content["audit"], image_id, label) for image_id, label in content["labels"].items()]
        return [entry for task in content for entry in _of_task(task)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(
            f"{path}: is neither a file of the page nor a JSON export of Label Studio or FiftyOne ({error!r}): name "
            "the one with the labels"
        ) from error


def _of_fiftyone(
    classes: Sequence[str] | None, labels: Mapping[str, int | str | None], ids: Sequence[str]
) -> Iterator[tuple[Any, Any, Any]]:
    """Labels by the names of the files, which have the audit and the number of the image."""
    for name, label in labels.items():
        if label is None:
            continue
        audit, _, number = PurePosixPath(name).name.partition(".")[0].partition("-")
        image_id = ids[int(number) - 1] if number.isdecimal() and 1 <= int(number) <= len(ids) else name
        yield audit, image_id, classes[label] if classes and isinstance(label, int) else label


def _of_task(task: Mapping[str, Any]) -> _Found:
    """A task of Label Studio's export; people who disagree are unsure."""
    said = {
        result["value"]["choices"][0]
        for annotation in task["annotations"]
        if not annotation.get("was_cancelled")
        for result in annotation["result"]
        if result["from_name"] == "relevant"
    }
    data = task["data"]
    return [(data["audit"], data["image_id"], said.pop() if len(said) == 1 else "unsure")] if said else []
