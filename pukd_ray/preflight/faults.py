"""What pydantic finds wrong with a config, in prose: one line per key, as people write it in YAML."""

from __future__ import annotations

import difflib
import json
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def validate(raw: Any, kind: type[T]) -> tuple[T | None, list[str]]:
    """`raw` as a `kind`, or None and a line for each fault."""
    try:
        return TypeAdapter(kind).validate_python(raw), []
    except ValidationError as error:
        return None, _readable(error, raw, kind)


# What pydantic calls a fault -> what a value should be, for people who write YAML.
_SHOULD_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_long": "a list of {max_length}",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
    "literal_error": "{expected}",
}
_SAYS_ALL = {"missing": "is required", "unexpected_keyword_argument": "unknown key", "string_too_short": "is empty"}


def _readable(error: ValidationError, raw: Any, kind: Any) -> list[str]:
    """One line per key; the branches of a union become one line."""
    said: dict[str, str] = {}
    should: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    lines: list[str] = []
    for item in error.errors(include_url=False):
        if not item["loc"] and item["type"] == "value_error":  # checks across sections name their keys
            lines += str(item["ctx"]["error"]).splitlines()
            continue
        key, value = _locate(item, raw, kind)
        values[key] = value
        if item["type"] in _SAYS_ALL:
            said[key] = _SAYS_ALL[item["type"]]
            if item["type"] == "unexpected_keyword_argument":
                said[key] += _hint(key, kind)
        elif item["type"] in _SHOULD_BE:
            should.setdefault(key, []).append(_SHOULD_BE[item["type"]].format(**item.get("ctx", {})).replace("'", ""))
        else:
            message = item["msg"].removeprefix("Value error, ")
            said[key] = f"{_shown(value)} {message}" if message.startswith("is not") else message
    for key in values:
        if any(other.startswith(f"{key}.") for other in values):
            continue  # another branch of the union found the item at fault
        lines.append(f"{key}: {said[key] if key in said else _expected(values[key], should[key])}")
    return lines


def _locate(item: Any, raw: Any, kind: Any) -> tuple[str, Any]:
    """The key at fault as the user wrote it, and its value; pydantic's path has the branches of unions too."""
    parts, node = [], raw
    for part in item["loc"]:
        fields = get_type_hints(kind) if is_dataclass(kind) else {}
        if isinstance(node, dict) and (part in node or part in fields):
            node = node.get(part)  # None: a required field, or a default that is at fault
            kind = _section(fields.get(part))
        elif isinstance(node, list) and isinstance(part, int) and (part < len(node) or item["type"] == "missing"):
            node = node[part] if part < len(node) else None
        else:
            continue
        parts.append(str(part))
    return ".".join(parts), node


def _hint(key: str, kind: Any) -> str:
    """Keys that an unknown one may be meant for: of this very name elsewhere, else of like names in its section."""
    *parents, last = key.split(".")
    section = kind
    for part in parents:
        if not part.isdecimal():
            section = _section(get_type_hints(section).get(part)) if is_dataclass(section) else None
    if not is_dataclass(section):
        return ""
    close = [
        f"{name}.{last}"
        for name, hint in get_type_hints(kind).items()
        if (other := _section(hint)) and last in get_type_hints(other)
    ]
    close = close or [".".join([*parents, name]) for name in difflib.get_close_matches(last, get_type_hints(section))]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _section(hint: Any) -> Any:
    """The dataclass that a field holds: alone, as an item, or where it is not null."""
    return next((t for t in (hint, *map(_section, get_args(hint))) if is_dataclass(t)), None)


def _expected(value: Any, options: list[str]) -> str:
    return f"{_shown(value)} should be {' or '.join(dict.fromkeys(options))}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
