"""The selection and the student as folders that Hugging Face's libraries open, each with a card. Nothing is uploaded.

`dataset/` is read by `datasets.load_dataset(FOLDER)`, and by this package; `model/` by timm (`local-dir:FOLDER`) where
the student is one of timm's, else by the lines on its card. The licence is the owner's to state: cards leave it open.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup

from pukd_ray import __version__
from pukd_ray.config import RunConfig
from pukd_ray.errors import RunError
from pukd_ray.report.page import class_names, explain_rule
from pukd_ray.run.folder import SELECTED_SCHEMA, RunFolder
from pukd_ray.run.records import METRICS, PRIOR, SELECTION, SELECTOR, STUDENT, StudentRecord
from pukd_ray.runtime.console import say
from pukd_ray.runtime.templates import load_templates
from pukd_ray.storage import redact

DATASET, MODEL = "dataset", "model"
BATCH_ROWS = 256
TIMM = "timm:"
_LICENCE = "# license: to be stated by the owner, here and below, before this is passed on\n"


def publish(run: RunFolder, config: RunConfig, target: RunFolder) -> None:
    """Write `dataset/` and, if the run has a student, `model/` into `target`; say what is there.

    RunError if the run has no finished selection, or `target` holds something already.
    """
    if run.marker("select") is None:
        raise RunError(f"{run.display}: nothing is selected yet: run the pipeline first")
    for name in (DATASET, MODEL):
        if target.exists(name):
            raise RunError(f"{target.display}/{name} is there already: name another folder, or move it away")
    about = _about(run, config)
    rows = write_dataset(run, target, about)
    say(f"dataset   {target.display}/{DATASET}: {rows:,} images, for datasets.load_dataset(...)")
    if run.marker("distill") is not None:
        write_model(run, target, about)
        say(f"model     {target.display}/{MODEL}: {about['student']['arch']}; its card says how it is loaded")
    say("          nothing was uploaded; both cards leave the licence to you")


def _about(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """What the cards say."""
    selection, selector, metrics = run.read_record(SELECTION), run.read_record(SELECTOR), run.find_record(METRICS)
    prior, scored = run.read_record(PRIOR), run.marker("score")
    names = class_names(selector["classes"], config.teacher.num_classes)
    return {
        "name": config.name,
        "version": __version__,
        "corpus": [redact(uri) for source in config.corpus for uri in source.uris],
        "n_corpus": scored["counts"]["n_corpus"] if scored else selection["n_scored"],
        "n_positives": selector["n_positives"],
        "selection": selection,
        "rule": config.selection.rule,
        "rule_text": explain_rule(config.selection),
        "estimated": selection["estimated"],
        "trust": metrics["trust"] if metrics else {"level": prior["trust"], "reasons": prior["reasons"]},
        "audit": metrics.get("audit") if metrics else None,
        "metrics": metrics,
        "prior": prior,
        "teacher": config.teacher.arch,
        "classes": list(zip(names, selection["class_counts"], strict=True)),
        "names": names,
        "student": run.find_record(STUDENT),
        "config": {"steps": config.distill.steps, "epochs": config.distill.epochs},
    }


# -- dataset ----------------------------------------------------------------------------------------------------

_VALUES = {"image_id": "string", "pu_probability": "float32", "teacher_confidence": "float32"}
"""Columns that are as in `selected/`, and what Hugging Face calls their types."""
_SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        *(SELECTED_SCHEMA.field(name).with_nullable(True) for name in _VALUES),
    ]
)


def write_dataset(run: RunFolder, target: RunFolder, about: Mapping[str, Any]) -> int:
    """`data/train-*.parquet`, a file for each of `selected/`, and the card; returns the number of images.

    `label` is what the teacher says; a source's path stays behind, an image's id does not.
    """
    names = about["names"]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
        **{name: {"dtype": kind, "_type": "Value"} for name, kind in _VALUES.items()},
    }
    schema = _SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parts = [file for file in run.files("selected") if file.endswith(".parquet")]
    rows = 0
    for number, part in enumerate(parts):
        counted = [0]

        def write(sink: Any, part: str = part, counted: list[int] = counted) -> None:
            counted[0] = 0
            with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
                for batch in _batches(run, part, schema):
                    writer.write_batch(batch)
                    counted[0] += batch.num_rows

        target.write(f"{DATASET}/data/train-{number:05d}-of-{len(parts):05d}.parquet", write)
        rows += counted[0]
    dtypes = {
        "image": "image",
        "label": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}},
        **_VALUES,
    }
    front = {
        "task_categories": ["image-classification"],
        "pretty_name": about["name"],
        "tags": ["pukd_ray", "positive-unlabelled"],
        "dataset_info": {
            "features": [{"name": name, "dtype": dtype} for name, dtype in dtypes.items()],
            "splits": [{"name": "train", "num_examples": rows}],
        },
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    target.write_text(f"{DATASET}/README.md", _card("dataset.md.j2", front, about))
    return rows


def _batches(run: RunFolder, part: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    columns = ["image", "teacher_label", *_VALUES]
    with run.open(part) as source:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=BATCH_ROWS, columns=columns):
            images = batch.column("image")
            nothing = pa.nulls(len(batch), pa.string())
            cells = pa.StructArray.from_arrays([images, nothing], fields=list(_SCHEMA.field("image").type))
            labels = batch.column("teacher_label").cast(pa.int64())
            yield pa.record_batch([cells, labels, *(batch.column(name) for name in _VALUES)], schema=schema)


# -- model ------------------------------------------------------------------------------------------------------


def write_model(run: RunFolder, target: RunFolder, about: Mapping[str, Any]) -> None:
    """`model.safetensors`, `config.json`, `meta.json` (preprocessing, classes) and the card."""
    from safetensors.torch import save

    from pukd_ray.networks.teacher import load_state

    student: StudentRecord = about["student"]
    state = load_state(run.read_bytes("student/student.pt"))
    # Copies: safetensors refuses tensors that share memory.
    data = save({name: tensor.contiguous().clone() for name, tensor in state.items()}, {"format": "pt"})
    target.write_bytes(f"{MODEL}/model.safetensors", data)
    target.write_json(f"{MODEL}/config.json", model_config(student, about["names"]))
    target.write_json(f"{MODEL}/meta.json", dict(student))
    is_timm = student["arch"].startswith(TIMM)
    front = {
        "pipeline_tag": "image-classification",
        "library_name": "timm" if is_timm else "pytorch",
        "tags": ["pukd_ray", "image-classification", *(["timm"] if is_timm else [])],
    }
    target.write_text(f"{MODEL}/README.md", _card("model.md.j2", front, {**about, "is_timm": is_timm}))


def model_config(student: StudentRecord, names: Sequence[str]) -> dict[str, Any]:
    """`config.json` as timm reads it; of other networks the same keys, for people."""
    shown = student["preprocessing"]
    size, channels = shown["input_size"], shown["channels"]
    return {
        "architecture": student["arch"].removeprefix(TIMM),
        "num_classes": student["num_classes"],
        **({"model_args": {"in_chans": channels}} if channels != 3 else {}),
        "label_names": list(names),
        "pretrained_cfg": {
            "input_size": [channels, size, size],
            "fixed_input_size": _has_fixed_size(student["arch"]),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[shown["resize"]],
            "mean": shown["mean"],
            "std": shown["std"],
            "num_classes": student["num_classes"],
            "label_names": list(names),
        },
    }


def _has_fixed_size(arch: str) -> bool:
    """Whether timm builds the network for one size of images, as it does transformers."""
    if not arch.startswith(TIMM):
        return False
    import timm

    known = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    return known is not None and bool(known.fixed_input_size)


def _card(template: str, front: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    sink = io.StringIO()
    yaml.safe_dump(dict(front), sink, sort_keys=False, allow_unicode=True)
    head = Markup(f"---\n{_LICENCE}{sink.getvalue()}---\n")
    templates = load_templates("report")
    return templates.get_template(template).render(front=head, **about)
