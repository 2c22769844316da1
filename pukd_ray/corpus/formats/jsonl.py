"""JSON Lines: one object a line, with the image itself as base64 text or the path of its file, and a label.

Keys: `image` (the source's `image_column`; base64, without line breaks or a `data:` prefix), else `path`; `label` (or
`label_column`); `id_column` and `relevant_column` where the source has them. Blank lines are no rows.

A path stays within the folder of its JSONL file: a relative one counts from there, an absolute one or a URI must begin
with that folder, and none has `..`. So a file from a stranger cannot make a run copy whatever its user may read into a
selection, or ask other machines; links in the folder are followed, as in a folder of images. The images are no part of
the plan: one that changes after it goes unnoticed.

A file is read once while it is counted; its units then know where their lines are, and a single row costs its line. In
a gzip'd file, which is one unit, it costs all lines before it, unparsed.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units
from pukd_ray.corpus.faults import BROKEN, one_line, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile, Spans, is_packed, open_blocks, open_raw, read_beside
from pukd_ray.corpus.formats.base import Format, is_the_column_right
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import BadValueError, ImageRow, as_text, failed_rows, make_row, parse_json, row_id
from pukd_ray.corpus.units import Unit, indexed_parts

LINE_BYTES = 32 << 20
"""Longest line that is parsed."""
PIECE_BYTES = 1 << 20
LINES_AHEAD = 16  # files that are fetched at a time: latency, not bandwidth


def _claims(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix in IMAGE_EXTENSIONS


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    """Reads all of the file: nothing else tells how many lines it has, and where."""
    del source
    parts: list[tuple[int, int]] = []
    indices: list[bytes] = []
    spans: list[tuple[int, int]] = []
    rows, note = 0, None

    def end_part() -> None:
        starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
        parts.append((len(spans), int((stops - starts).sum())))
        indices.append(Spans(starts, stops, np.ones(len(spans), np.int64)).pack())
        spans.clear()

    with open_raw(file.uri) as handle:
        try:
            for start, stop, _ in _lines(handle):
                rows += 1
                if is_packed(file.uri):
                    continue
                if spans and (len(spans) >= units.UNIT_ROWS or stop - spans[0][0] > units.UNIT_BYTES):
                    end_part()
                spans.append((start, stop))
        except BROKEN as error:
            note = f"{file.uri} ends early, after {rows} lines: {one_line(error)}"
    if is_packed(file.uri):
        return FileFacts(((rows, file.size),), note=note)
    end_part()
    return FileFacts(tuple(parts), note=note, indices=tuple(indices))


def _lines(handle: IO[bytes]) -> Iterator[tuple[int, int, bytes | None]]:
    """(first byte, byte after the last, line) of those that are not blank; None for more than `LINE_BYTES`."""
    # A gzip'd file gives what precedes a broken place only if it is not asked for more.
    read = getattr(handle, "read1", handle.read)
    line: list[bytes] = []
    start = size = 0
    while True:
        piece = read(PIECE_BYTES)
        for number, part in enumerate(piece.split(b"\n")):
            if number or not piece:  # the line so far has ended
                whole = b"".join(line)
                if size > LINE_BYTES:
                    yield start, start + size, None
                elif whole.strip():
                    yield start, start + size, whole
                line, start, size = [], start + size + 1, 0
            size += len(part)
            if size <= LINE_BYTES:
                line.append(part)
            else:
                line.clear()
        if not piece:
            return


def _wanted_lines(unit: Unit, wanted: list[int]) -> Iterator[tuple[int, bytes | None]]:
    """(row, line) of the wanted rows: from their places, or from the file's start if it has none to go to."""
    if unit.index is None:
        chosen = frozenset(wanted)
        whole = wanted[-1] == unit.start + unit.rows - 1
        with open_raw(unit.files[0], whole=whole) as handle:
            for row, (_, _, line) in enumerate(_lines(handle)):
                if row in chosen:
                    yield row, line
                if row == wanted[-1]:
                    return
        return
    spans = Spans.unpack(unit.index)
    places = np.array(wanted) - unit.group_start
    starts, stops = spans.starts[places], spans.stops[places]
    with open_blocks(unit.files[0], starts, stops) as handle:
        for row, start, stop in zip(wanted, starts.tolist(), stops.tolist(), strict=True):
            if stop - start > LINE_BYTES:
                yield row, None
                continue
            handle.seek(start)
            line = handle.read(stop - start)
            if len(line) < stop - start:
                raise EOFError("the file ends within this line")
            yield row, line


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Parses the wanted lines only, a few at a time."""
    wanted = (unit.start + positions).tolist()
    repeated = frozenset(unit.repeated)
    done, failure, held = 0, None, 0
    ahead: deque[tuple[int, Future[ImageRow]]] = deque()
    with ThreadPoolExecutor(LINES_AHEAD) as pool:
        try:
            for row, line in _wanted_lines(unit, wanted):
                size = len(line or b"")
                ahead.append((size, pool.submit(_parse, unit, source, images, repeated, row, line)))
                done, held = done + 1, held + size
                while len(ahead) == LINES_AHEAD or held > LINE_BYTES:
                    size, parsed = ahead.popleft()
                    held -= size
                    yield parsed.result()
        except BROKEN as error:
            failure = reason_of(error)
        while ahead:
            yield ahead.popleft()[1].result()
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
        values = parse_json(line, "not a line of JSON")
        if not isinstance(values, dict):
            return bad(error="corrupt: the line is JSON, but not an object")
        given = values.get(source.id_column) if source.id_column else None
        label = values.get(source.label_column or "label")
        for value in (given, label):
            if isinstance(value, dict | list):
                return bad(error="corrupt: an id or a label is an object or a list")
            as_text(value, "not a line of JSON: an id or a label")  # halves of surrogate pairs are JSON, but no text
    except BadValueError as error:
        return bad(error=str(error))
    duplicate = f"{given!r} is the id of an earlier row" if row in repeated else None
    image, reason = _image(values, source, uri) if images else (None, None)
    truth = values.get(source.relevant_column) if source.relevant_column else None
    more = {"given": given, "label": label, "truth": truth, "duplicate": duplicate}
    return make_row(unit, row, image, images=images, error=reason, **more)


def _image(values: dict[str, Any], source: SourceConfig, uri: str) -> tuple[bytes | None, str | None]:
    """(encoded bytes, None) or (None, reason) of a line's image."""
    text, path = values.get(source.image_column), values.get("path")
    if text is not None and (text != "" or path is None):
        if not isinstance(text, str):
            return None, f"corrupt: {source.image_column} is not text"
        try:
            return base64.b64decode(text, validate=True), None
        except ValueError as error:
            more = "; the path of a file goes into path" if _is_image(text.lower()) else ""
            return None, f"corrupt: {source.image_column} is not base64: {one_line(error)}{more}"
    if path is None:
        return None, f"empty: neither {source.image_column} nor path"
    if not isinstance(path, str):
        return None, f"unsupported: not a path in the folder of the file: {path!r}"[:200]
    return read_beside(uri, path, source.follow_links)


JSONL = Format(
    name="jsonl",
    claims=_claims,
    measure=_measure,
    cut=indexed_parts,
    read=_read,
    row_addressable=True,
    read_to_count=True,
    side_file=_is_image,
    has_id_column=True,
    label_hint=is_the_column_right,
)
"""A row costs its line; in a gzip'd file, all lines before it, unparsed."""
