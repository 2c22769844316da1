"""JSON Lines: one object a line, with the image itself as base64 text or the path of its file, and a label.

Keys: `image` (the source's `image_column`; base64, without line breaks or a `data:` prefix), else `path`; `label` (or
`label_column`); `id_column` and `relevant_column` where the source has them. Blank lines are no rows.

A path stays within the folder of its JSONL file: a relative one counts from there, an absolute one or a URI must begin
with that folder, and none has `..`. So a file from a stranger cannot make a run copy whatever its user may read into a
selection, or ask other machines; links in the folder are followed, as in a folder of images. The images are no part of
the plan: one that changes after it goes unnoticed.

A single row costs all lines before it, unparsed; a file is read from its start, by one task.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.faults import BROKEN, one_line, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile, open_raw, read_whole
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import ImageRow, as_label, as_truth, failed_rows, row_id, users_id
from pukd_ray.corpus.units import Unit, whole_files
from pukd_ray.errors import MissingError
from pukd_ray.storage import is_local, split_uri

LINE_BYTES = 32 << 20
"""Longest line that is parsed."""
PIECE_BYTES = 1 << 20
LINES_AHEAD = 16  # files that are fetched at a time: latency, not bandwidth


def _claims(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix in IMAGE_EXTENSIONS


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    """Reads all of the file: nothing else tells how many lines it has."""
    del source
    rows, note = 0, None
    with open_raw(file.uri) as handle:
        try:
            for _ in _lines(handle):
                rows += 1
        except BROKEN as error:
            note = f"{file.uri} ends early, after {rows} lines: {one_line(error)}"
    return FileFacts(((rows, file.size),), note=note)


def _lines(handle: IO[bytes]) -> Iterator[bytes | None]:
    """Lines that are not blank; None for one of more than `LINE_BYTES`, which is not kept."""
    # A gzip'd file gives what precedes a broken place only if it is not asked for more.
    read = getattr(handle, "read1", handle.read)
    line: list[bytes] = []
    size = 0
    while True:
        piece = read(PIECE_BYTES)
        for number, part in enumerate(piece.split(b"\n")):
            if number or not piece:  # the line so far has ended
                whole = b"".join(line)
                if size > LINE_BYTES:
                    yield None
                elif whole.strip():
                    yield whole
                line, size = [], 0
            size += len(part)
            if size <= LINE_BYTES:
                line.append(part)
            else:
                line.clear()
        if not piece:
            return


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Parses the wanted lines only, a few at a time."""
    wanted = (unit.start + positions).tolist()
    chosen, repeated = frozenset(wanted), frozenset(unit.repeated)
    done, failure = 0, None
    ahead: deque[Future[ImageRow]] = deque()
    with ThreadPoolExecutor(LINES_AHEAD) as pool:
        try:
            with open_raw(unit.files[0]) as handle:
                for row, line in enumerate(_lines(handle)):
                    if row in chosen:
                        ahead.append(pool.submit(_parse, unit, source, images, repeated, row, line))
                        done += 1
                    if len(ahead) == LINES_AHEAD:
                        yield ahead.popleft().result()
                    if row == wanted[-1]:
                        break
        except BROKEN as error:
            failure = reason_of(error)
        while ahead:
            yield ahead.popleft().result()
    if failure:  # where the plan could read on; else it has told the user that this file ends early
        yield from failed_rows(unit, wanted[done:], failure)


def _parse(
    unit: Unit, source: SourceConfig, images: bool, repeated: Collection[int], row: int, line: bytes | None
) -> ImageRow:
    uri = unit.files[0]
    bad = partial(ImageRow, row_id(unit, row), uri, row, None)
    if line is None:
        return bad(error=f"too_large: the line has more than {LINE_BYTES >> 20} MiB")
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            return bad(error="corrupt: the line is JSON, but not an object")
        given = values.get(source.id_column) if source.id_column else None
        label = as_label(values.get(source.label_column or "label"))
        for value in (given, label):
            if isinstance(value, dict | list):
                return bad(error="corrupt: an id or a label is an object or a list")
        f"{given}{label}".encode()  # halves of surrogate pairs are JSON, but no text
    except (ValueError, RecursionError) as error:
        return bad(error=f"corrupt: not a line of JSON: {one_line(error)}")
    image_id, fault = users_id(unit, row, given, repeated)
    image, reason = _image(values, source, uri) if images else (None, None)
    truth = as_truth(values.get(source.relevant_column)) if source.relevant_column else None
    return ImageRow(image_id, uri, row, image, label, truth, reason or fault)


def _image(values: dict[str, Any], source: SourceConfig, uri: str) -> tuple[bytes | None, str | None]:
    """(encoded bytes, None) or (None, reason) of a line's image."""
    text, path = values.get(source.image_column), values.get("path")
    if text is not None:
        if not isinstance(text, str):
            return None, f"corrupt: {source.image_column} is not text"
        try:
            return base64.b64decode(text, validate=True), None
        except ValueError as error:
            return None, f"corrupt: {source.image_column} is not base64: {one_line(error)}"
    if path is None:
        return None, f"empty: neither {source.image_column} nor path"
    if not isinstance(path, str) or (file := _resolve(uri, path)) is None:
        return None, f"unsupported: not a path in the folder of the file: {path!r}"[:200]
    try:
        return read_whole(file)
    except MissingError:  # the plan knows nothing of this file: it is the line that is wrong
        return None, f"io: there is no file {path!r}"[:200]


def _resolve(uri: str, path: str) -> str | None:
    """Where the image at `path` is that the JSONL file `uri` names; None outside of its folder."""
    scheme, own, query = split_uri(uri)
    folder = own.rpartition("/")[0] + "/"
    named, place, more = split_uri(path)
    if named:
        same = named == scheme or (is_local(path) and is_local(uri))
        if not same or more not in ("", query):
            return None
    else:
        place = path if path.startswith("/") and is_local(uri) else folder + path
    inside = place.startswith(folder) and ".." not in unquote(place).split("/")
    found = f"{scheme}{place}{query}"
    # A path must not bring options of the storage with it, such as another host.
    return found if inside and split_uri(found) == (scheme, place, query) else None


JSONL = Format(
    name="jsonl",
    claims=_claims,
    measure=_measure,
    cut=whole_files,
    read=_read,
    row_addressable=False,
    side_file=_is_image,
    has_id_column=True,
    label_hint="is label_column {source.label_column!r} right?",
)
"""A row costs all lines before it, unparsed."""
