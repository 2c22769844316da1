"""Rows as readers give them, and the one boundary that names, ids, labels and truth pass on their way in.

Files come from strangers: text in them may be no text, a number may have 5,000 digits, JSON may be nested without end.
Whatever a file says of a row becomes an `ImageRow` here, safe to write into any table, or its reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pukd_ray.corpus.faults import one_line
from pukd_ray.corpus.files import IMAGE_BYTES
from pukd_ray.corpus.units import Unit

TEXT_CHARS = 4096
"""Longest id or label."""
JSON_VALUES = 1_000_000
"""Most commas and brackets in a piece of JSON: each costs some sixty times its size once it is parsed."""

_LOOKS_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2}|u[0-9a-f]{4})")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})")
_NO_CHARACTER = re.compile(r"[\ud800-\udfff\0]")


@dataclass(frozen=True)
class ImageRow:
    """One image as read; `row` counts within the file."""

    image_id: str
    source: str
    row: int
    image: bytes | None
    label: int | str | None = None
    relevant: bool | None = None
    error: str | None = None


class BadValueError(ValueError):
    """What a file says of one row cannot be used; its text is the row's reason, `corrupt: detail`."""


def safe_text(given: str | bytes) -> str:
    r"""Text that any table can hold: what is no character becomes `\xNN` (a byte) or `\uNNNN` (half a surrogate pair).

    A backslash that would read as the start of one becomes `\x5c`, so that no two names become the same; `raw_text`
    undoes it.

    >>> safe_text(b"caf\xe9.jpg"), safe_text("a\\b"), safe_text(r"caf\xe9.jpg")
    ('caf\\xe9.jpg', 'a\\b', 'caf\\x5cxe9.jpg')
    """
    text = given.decode(errors="surrogateescape") if isinstance(given, bytes) else given
    if "\\" in text:
        text = _LOOKS_ESCAPED.sub(r"\\x5c", text)
    return _NO_CHARACTER.sub(lambda match: _escaped(ord(match[0])), text)


def _escaped(code: int) -> str:
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # as Python smuggles bytes into text
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{code:04x}"


def raw_text(safe: str) -> str:
    """Inverse of `safe_text`; bytes that are no UTF-8 come back as Python smuggles them (`surrogateescape`).

    >>> raw_text(safe_text(b"caf\\xe9.jpg")).encode(errors="surrogateescape")
    b'caf\\xe9.jpg'
    """

    def character(match: re.Match[str]) -> str:
        code = int(match[1] or match[2], 16)
        return chr(code + 0xDC00 if match[1] and code >= 0x80 else code)

    return _ESCAPE.sub(character, safe)


def parse_json(data: bytes, what: str) -> Any:
    """A JSON value; BadValueError, which begins with `what`, for all that is none or would not end."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > JSON_VALUES:
        raise BadValueError(f"corrupt: {what}: more than {JSON_VALUES:,} values")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"corrupt: {what}: {one_line(error)}") from error


def parse_number(text: str) -> int | str:
    """A label in a text: digits are a number. BadValueError if there are thousands."""
    if not re.fullmatch("-?[0-9]+", text):
        return text
    if len(text) > 20:
        raise BadValueError(f"corrupt: the label has {len(text):,} digits")
    return int(text)


def row_id(unit: Unit, row: int) -> str:
    """Id of a row of the unit's file that the user gave none."""
    return f"{unit.ids[0]}#{row}"


def make_row(
    unit: Unit,
    row: int,
    image: bytes | None,
    *,
    images: bool,
    name: str | None = None,
    given: Any = None,
    label: Any = None,
    truth: Any = None,
    duplicate: str | None = None,
    error: str | None = None,
) -> ImageRow:
    """What a file says of a row, made safe; what cannot be used of it is the row's reason.

    `name`: the id where the user gives none (None: `row_id`); `given`: what `id_column` says; `duplicate`: how an
    earlier row has the same id; `error`: why there is no `image`; `images`: whether it was asked for.
    """
    image_id = row_id(unit, row) if name is None else name
    reasons: list[str | None] = [error]
    if image is not None and (size := len(image)) > IMAGE_BYTES:
        image, reasons = None, [f"too_large: {size:,} bytes, more than {IMAGE_BYTES >> 20} MiB"]
    try:
        label = as_label(label)
    except BadValueError as fault:
        label = None
        reasons.append(str(fault))
    try:
        users = None if given is None or given == "" else as_text(given, "the id")
        image_id = image_id if users is None or duplicate else users
    except BadValueError as fault:
        reasons.append(str(fault))
    try:
        relevant = as_truth(truth)
    except BadValueError as fault:
        relevant = None
        reasons.append(str(fault))
    reasons.append(duplicate and f"duplicate_id: {duplicate}")
    reason = next((reason for reason in reasons if reason), None)
    if reason and not error and images and not image and not reason.startswith("too_large"):
        reason = "empty: no bytes"  # of several reasons the first of the list
    return ImageRow(image_id, unit.files[0], row, image, label, relevant, reason)


def failed_rows(unit: Unit, rows: Iterable[int], reason: str | None) -> Iterator[ImageRow]:
    """Rows of the unit's file of which nothing is known but, perhaps, a reason."""
    for row in rows:
        yield ImageRow(row_id(unit, row), unit.files[0], row, None, error=reason)


def as_text(value: Any, what: str) -> str:
    """An id or a label as text; BadValueError, which begins with `what`, if it is none or too long."""
    if isinstance(value, BadValueError):
        raise value
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    if len(text) > TEXT_CHARS:
        raise BadValueError(f"corrupt: {what} has {len(text):,} characters")
    if _NO_CHARACTER.search(text):
        raise BadValueError(f"corrupt: {what} is no text: {safe_text(text)[:100]}")
    return text


def as_label(value: Any) -> Any:
    """A label as an int or a str where it stands for one: 3.0 is what pandas makes of 3 next to a null."""
    if isinstance(value, BadValueError):
        raise value
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, str | bytes):
        return as_text(value, "the label") or None
    return value


def as_truth(value: Any) -> bool | None:
    """A truth column's value: 0.0 and 1.0 are what pandas makes of false and true next to a null.

    BadValueError if it is neither boolean nor 0 or 1.
    """
    if isinstance(value, BadValueError):
        raise value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value in (0, 1):
        return bool(value)
    short = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    shown = value if short else f"a {type(value).__name__}"
    raise BadValueError(f"corrupt: relevant_column: {shown} is neither true nor false")
