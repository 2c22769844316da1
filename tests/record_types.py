"""Whether a JSON value is what a TypedDict says: type checkers see what is written, not what is on storage."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict


def faults_of(value: Any, kind: Any, where: str = "") -> list[str]:
    """A line for each part of `value` that `kind` does not allow: keys lacking or unknown, values of other types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return []
    if origin is NotRequired:
        return faults_of(value, arguments[0], where)
    if origin in (Union, UnionType):
        found = [
            faults_of(value, option, where) for option in arguments if not (option is NoneType and value is not None)
        ]
        return min(found, key=len)
    if origin is Literal:
        return [] if value in arguments else [f"{where}: {value!r} is none of {arguments}"]
    plain = dict if is_typeddict(kind) else origin or kind
    if type(value) is not plain and not (plain is float and type(value) is int):
        return [f"{where}: {value!r} is no {plain.__name__}"]
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        # Not `__required_keys__`: it knows nothing of `NotRequired` where annotations are strings.
        required = {key for key, hint in hints.items() if get_origin(hint) is not NotRequired}
        lacking = [f"{where}: {key} lacks" for key in sorted(required - value.keys())]
        unknown = [f"{where}: {key} is unknown" for key in sorted(value.keys() - hints.keys())]
        inner = [f for key in hints if key in value for f in faults_of(value[key], hints[key], f"{where}/{key}")]
        return [*lacking, *unknown, *inner]
    if plain is list:
        return [f for i, item in enumerate(value) for f in faults_of(item, arguments[0], f"{where}/{i}")]
    if plain is dict:
        return [f for key, item in value.items() for f in faults_of(item, arguments[1], f"{where}/{key}")]
    return []
