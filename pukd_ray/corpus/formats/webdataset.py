"""Tars in the manner of webdataset: image members are rows, `.cls` and `.json` members of the same key their labels.

A single row costs the headers of all members before it; in a compressed tar, everything before it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.faults import BROKEN, one_line, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import ImageRow, as_label, as_truth, failed_rows
from pukd_ray.corpus.units import Unit, whole_files
from pukd_ray.storage import open_file


def _claims(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    rows, note = 0, None
    # Seeks from header to header where the file is not compressed: the count does not depend on the reader.
    with open_file(file.uri) as handle, tarfile.open(fileobj=handle, mode="r:*") as tar:
        try:
            for member in tar:
                rows += _is_image(member)
        except BROKEN as error:
            note = f"{file.uri} ends early, after {rows} images: {one_line(error)}"
    return FileFacts(((rows, file.size),), note=note)


def _is_image(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name)
    return member.isfile() and name.suffix.lower() in IMAGE_EXTENSIONS and not name.name.startswith(".")


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    wanted = (unit.start + positions).tolist()
    done, failure = 0, None
    for row in _walk(unit, source, frozenset(wanted), images):
        if isinstance(row, str):
            failure = row
        else:
            yield row
            done += 1
    if failure:  # where the plan could read on; else it has told the user that this tar ends early
        yield from failed_rows(unit, wanted[done:], failure)


def _walk(unit: Unit, source: SourceConfig, wanted: Collection[int], images: bool) -> Iterator[ImageRow | str]:
    """The wanted rows of the tar, from its start, and at its end the reason if it broke off.

    Only wanted members are extracted, and side data that may be theirs.
    """
    row, last = 0, max(wanted)
    seen: set[str] = set()
    group: list[ImageRow] = []
    key = ""
    images_of_key = 0
    side: dict[str, bytes] = {}
    try:
        with open_file(unit.files[0]) as handle, tarfile.open(fileobj=handle, mode="r:*") as tar:
            for member in tar:
                member_key = member.name[: -len(_suffix(member.name)) or None]
                if member_key != key:
                    yield from _with_side_data(group, side, source)
                    group, side, key, images_of_key = [], {}, member_key, 0
                    if row > last:
                        return
                if _is_image(member):
                    name, error = f"{unit.ids[0]}#{member.name}", None
                    if name in seen:
                        name, error = f"{name}#{row}", f"duplicate_id: {member.name} is in this tar twice"
                    seen.add(name)
                    if row in wanted:
                        data, fault = _member_bytes(tar, member) if images else (None, None)
                        group.append(ImageRow(name, unit.files[0], row, data, error=fault or error))
                    row += 1
                    images_of_key += 1
                elif _is_side_data(member) and (group or not images_of_key):
                    side[_suffix(member.name).lower()] = _member_bytes(tar, member)[0] or b""
    except BROKEN as error:
        yield from _with_side_data(group, side, source)
        yield reason_of(error)
    else:
        yield from _with_side_data(group, side, source)


def _is_side_data(member: tarfile.TarInfo) -> bool:
    return member.isfile() and member.name.lower().endswith((".cls", ".json"))


def _suffix(name: str) -> str:
    """From the first dot of the base name on: webdataset's extension."""
    base = name.rpartition("/")[2]
    return base[base.index(".") :] if "." in base else ""


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes | None, str | None]:
    try:
        source = tar.extractfile(member)
        data = source.read() if source else b""
    except (tarfile.ReadError, EOFError) as error:
        return None, f"truncated: the tar ends within this member: {one_line(error)}"
    except BROKEN as error:
        return None, reason_of(error)
    if len(data) < member.size:
        return None, "truncated: the tar ends within this member"
    return data, None


def _with_side_data(group: list[ImageRow], side: dict[str, bytes], source: SourceConfig) -> Iterator[ImageRow]:
    label: int | str | None = None
    truth = None
    if ".cls" in side:
        text = side[".cls"].decode(errors="replace").strip()
        label = int(text) if re.fullmatch("-?[0-9]+", text) else as_label(text)
    if ".json" in side:
        try:
            values = json.loads(side[".json"])
        except ValueError:
            values = {}
        if isinstance(values, dict):
            label = as_label(values.get(source.label_column or "label", label))
            truth = as_truth(values.get(source.relevant_column)) if source.relevant_column else None
    for row in group:
        yield replace(row, label=label, relevant=truth)


WEBDATASET = Format(
    name="webdataset",
    claims=_claims,
    measure=_measure,
    cut=whole_files,
    read=_read,
    row_addressable=False,
    any_name=True,
)
"""A row costs the headers of all members before it; in a compressed tar, everything before it."""
