"""Data sets as Hugging Face keeps them: splits by the README's front matter, columns and class names by the Parquet
files' own metadata. Nothing here needs its libraries; `hf://` URIs go through huggingface_hub's filesystem.

The conventions: https://huggingface.co/docs/hub/datasets-manual-configuration and datasets-file-names-and-splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import yaml

from pukd_ray.config import ConfigError, SourceConfig
from pukd_ray.corpus.files import glob_pattern

CARD = "README.md"
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"([\w.]+?)-\d{5}-of-\d{5}\b")


def front_matter(text: str) -> Mapping[str, Any] | None:
    """What a README says of its data set between its first two `---`; None if it is no such README."""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        said = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    return said if isinstance(said, dict) and ("dataset_info" in said or "configs" in said) else None


def choose_split(card: Mapping[str, Any], names: Sequence[str], split: str | None, key: str) -> list[str]:
    """Those of the files `names`, relative to the data set's folder, that are of `split`, or of its only one.

    ConfigError naming the splits that there are, if there is a choice and `split` makes none of them.
    """
    splits = splits_of(card, names)
    if split is None and len(splits) <= 1:
        return next(iter(splits.values()), [])
    if split in splits:
        return splits[split]
    there = ", ".join(splits) or "none"
    what = "is needed by a data set of Hugging Face with several splits" if split is None else f"there is no {split!r}"
    raise ConfigError([f"{key}.split: {what}: {there}"])


def splits_of(card: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """Files by split; of a data set with several configs by `config/split`."""
    configs = [c for c in card.get("configs") or () if isinstance(c, dict)] or [{}]
    splits: dict[str, list[str]] = {}
    for config in configs:
        below = str(config.get("data_dir") or "").strip("/")
        mine = [name for name in names if not below or name.startswith(f"{below}/")]
        prefix = f"{config.get('config_name')}/" if len(configs) > 1 else ""
        for split, patterns in _patterns(config.get("data_files")):
            found = [name for name in mine if any(_matches(name, below, pattern) for pattern in patterns)]
            splits[prefix + split] = found
        if not config.get("data_files"):
            for name in mine:
                splits.setdefault(prefix + split_by_name(name), []).append(name)
    return {split: found for split, found in splits.items() if found}


def split_by_name(name: str) -> str:
    """What a file's name says where the card is silent: `data/train-00000-of-00002.parquet`, `x/test.parquet`."""
    shard = _SHARD.match(PurePosixPath(name).name)
    words = [shard[1]] if shard else re.split(r"[^A-Za-z]+", name)
    for split, keywords in _KEYWORDS.items():
        if any(word.lower() in keywords for word in words):
            return split
    return shard[1] if shard else "train"


def folders_below_split(folders: tuple[str, ...], split: str) -> tuple[str, ...]:
    """Folders of an image without those that are its split, if any are left: of `data/train/cat` it is `cat`."""
    *configs, name = split.split("/")
    words = {name, *_KEYWORDS.get(name, ())}
    at = next((i for i, folder in enumerate(folders) if folder not in ("data", *configs)), len(folders))
    is_split = at < len(folders) - 1 and folders[at].lower() in words
    return folders[at + 1 :] if is_split else folders


def _patterns(given: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of `data_files`: text, a list of texts, a mapping, or a list of {split, path}."""
    if not given:
        return []
    if isinstance(given, str):
        return [("train", [given])]
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    if all(isinstance(item, str) for item in given):
        return [("train", list(given))]
    return [
        (str(item.get("split", "train")), [path] if isinstance(path := item.get("path", ""), str) else list(path))
        for item in given
        if isinstance(item, dict)
    ]


def _matches(name: str, below: str, pattern: str) -> bool:
    whole = f"{below}/{pattern}".lstrip("/").removeprefix("./")
    return bool(glob_pattern(whole).fullmatch(name))


# -- columns ----------------------------------------------------------------------------------------------------


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Columns as the `datasets` library described them when it wrote the file; empty if another did."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def named_columns(schema: pa.Schema, source: SourceConfig) -> SourceConfig:
    """`source` with the columns that this file has for `image` and `label` where it has none of these names.

    The only one that its metadata calls an image, or class labels; else `img`.
    """
    names, features = set(schema.names), features_of(schema)

    def found(wanted: str, kind: str, usual: str) -> str:
        declared = [name for name, feature in features.items() if feature.get("_type") == kind and name in names]
        return declared[0] if len(declared) == 1 else usual if usual in names else wanted

    changes: dict[str, Any] = {}
    if source.image_column == "image" and "image" not in names:
        changes["image_column"] = found("image", "Image", "img")
    if source.label_column == "label" and "label" not in names:
        changes["label_column"] = found("label", "ClassLabel", "label")
    return replace(source, **changes) if changes else source


def label_names(schema: pa.Schema, column: str | None) -> tuple[str, ...] | None:
    """Names that the file gives to the integers of a column; None if it gives none."""
    names = features_of(schema).get(column or "", {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) and names else None
