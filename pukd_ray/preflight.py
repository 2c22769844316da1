"""Everything about a config that can be checked before Ray starts, all faults in one go."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pukd_ray.config import (
    ConfigError,
    RunConfig,
    SourceConfig,
    Sources,
    StudentConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from pukd_ray.corpus.sources import check_reachable
from pukd_ray.storage import is_local, open_storage, read_bytes

T = TypeVar("T")

SOURCE_KEYS = ("positives", "corpus", "test", "train")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; PyYAML's 1.1 rules want 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML file, apply `overrides` such as `{"selector.prior": 0.2}`, check all that can be checked.

    Input paths become absolute (relative ones resolve against the file's folder); `output` is left as it is.
    Raises ConfigError whose `faults` has one line per fault, each naming its key.
    """
    return _load(path, overrides, RunConfig)


def load_teacher_training(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TeacherTrainingConfig:
    """As `load_config`, for `jobs/train_teacher.py`; `teacher.weights` is an output there."""
    return _load(path, overrides, TeacherTrainingConfig)


def parse_value(text: str) -> Any:
    """A command-line value by YAML's rules."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _load(path: str | Path, overrides: Mapping[str, Any] | None, kind: type[T]) -> T:
    raw = _read_yaml(Path(path))
    faults = _apply(raw, overrides or {})
    base = Path(path).absolute().parent
    raw = _resolve_paths(raw, base)
    faults += _resolve_classes(raw)
    config, value_faults = _validate(raw, kind)
    faults += value_faults
    faults += _file_faults(raw, writes_teacher=kind is TeacherTrainingConfig)
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise ConfigError([f"--config: cannot read {path}: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f" line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ConfigError([f"--config: {path}{where} is not YAML: {getattr(error, 'problem', error)}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"--config: {path} must hold keys and values"])
    return {str(key): value for key, value in raw.items()}


def _apply(raw: dict[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node: Any = raw
        for part in parents:
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
            else:
                node = None
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            faults.append(f"{key}: there is no such key to set")
    return faults


def _resolve_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(v) for v in value]
        if not isinstance(value, str) or not value or not is_local(value):
            return value
        return os.path.normpath(base / Path(value.removeprefix("file://")).expanduser())

    def source(value: Any) -> Any:
        if isinstance(value, list):
            return [source(v) for v in value]
        return {**value, "uri": absolute(value["uri"])} if isinstance(value, dict) and "uri" in value else value

    raw = {key: source(value) if key in SOURCE_KEYS else value for key, value in raw.items()}
    teacher = raw.get("teacher")
    if isinstance(teacher, dict):
        raw["teacher"] = {
            k: absolute(v) if k == "weights" or (k == "classes" and isinstance(v, str)) else v
            for k, v in teacher.items()
        }
    return raw


def _resolve_classes(raw: dict[str, Any]) -> list[str]:
    """A file of class names is read at once, so that the resolved config stands alone."""
    teacher = raw.get("teacher")
    if not isinstance(teacher, dict) or not isinstance(teacher.get("classes"), str):
        return []
    try:
        text = read_bytes(*open_storage(teacher["classes"])).decode()
    except (OSError, ValueError) as error:
        fault = f"teacher.classes: cannot read {teacher['classes']}: {error}"
        teacher["classes"] = None
        return [fault]
    teacher["classes"] = [line.strip() for line in text.splitlines() if line.strip()]
    return []


def _validate(raw: Any, kind: Any, prefix: str = "") -> tuple[Any, list[str]]:
    try:
        return TypeAdapter(kind).validate_python(raw), []
    except ValidationError as error:
        return None, _readable(error, raw, prefix)


def _readable(error: ValidationError, raw: Any, prefix: str) -> list[str]:
    """One line per key; the branches of a union become one line."""
    by_key: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for item in error.errors(include_url=False):
        parts, node = [], raw
        for part in item["loc"]:
            if isinstance(node, dict) and (part in node or item["type"] in ("missing",)):
                parts.append(str(part))
                node = node.get(part)
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                parts.append(str(part))
                node = node[part]
        key = ".".join([prefix, *parts] if prefix else parts)
        message = {
            "missing": "is required",
            "unexpected_keyword_argument": "unknown key",
        }.get(item["type"], item["msg"].removeprefix("Value error, "))
        by_key.setdefault(key, []).append(message[0].lower() + message[1:])
        values[key] = node
    lines = []
    for key, messages in by_key.items():
        text = " or ".join(dict.fromkeys(messages)).replace("input should", "should").replace(" or should be", " or")
        if re.match(r"[a-z_]+(\.[a-z_]+)+:", text):  # a cross-field check names its own key
            lines.append(text)
        elif re.match(r"[a-z_]+:", text):
            lines.append(f"{key}.{text}")
        elif text in ("is required", "unknown key"):
            lines.append(f"{key}: {text}")
        else:
            lines.append(f"{key}: {values[key]!r} {text}")
    return lines


def _file_faults(raw: dict[str, Any], *, writes_teacher: bool) -> list[str]:
    """Faults of files, for every part of the config that is well-formed enough to say which files it means."""
    faults: list[str] = []
    for key in SOURCE_KEYS:
        if raw.get(key) is None:
            continue
        sources: tuple[SourceConfig, ...] = _pruned(raw[key], Sources) or ()
        for index, source in enumerate(sources):
            faults += check_reachable(source, key if len(sources) == 1 else f"{key}.{index}")
    teacher: TeacherConfig | None = _pruned(raw.get("teacher"), TeacherConfig)
    if teacher is None:
        return faults
    faults += _network_faults(teacher, None if writes_teacher else teacher.weights)
    student = _pruned(raw.get("student") or {}, StudentConfig)
    if student is not None and not writes_teacher:
        faults += [
            f.replace("teacher.arch", "student.arch")
            for f in _network_faults(replace(teacher, arch=student.arch), None)
        ]
    return faults


def _pruned(raw: Any, kind: Any) -> Any:
    """`raw` as `kind` after dropping the values at fault (they are reported already); None if that is not enough."""
    raw = _copy(raw)
    for _ in range(3):
        try:
            return TypeAdapter(kind).validate_python(raw)
        except ValidationError as error:
            for item in error.errors():
                _drop(raw, [p for p in item["loc"] if isinstance(p, str | int)])
    return None


def _copy(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {k: _copy(v) for k, v in raw.items()}
    return [_copy(v) for v in raw] if isinstance(raw, list) else raw


def _drop(raw: Any, loc: Iterable[str | int]) -> None:
    node, parent, last = raw, None, None
    for part in loc:
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            parent, last, node = node, part, node[part]  # type: ignore[index]
    if isinstance(parent, dict):
        parent.pop(last)


def _network_faults(teacher: TeacherConfig, weights: str | None) -> list[str]:
    # torch takes seconds to import: only once there is something to check.
    import torch

    from pukd_ray.networks.zoo import build_network, check_weights

    numbers = {"num_classes": teacher.num_classes, "channels": teacher.channels, "input_size": teacher.input_size}
    if weights is None:
        try:
            with torch.device("meta"):
                build_network(teacher.arch, **numbers)
        except ValueError as error:
            return [f"teacher.arch: {error}"]
        return []
    try:
        state = torch.load(io.BytesIO(read_bytes(*open_storage(weights))), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return [f"teacher.weights: no such file: {weights}"]
    except Exception as error:
        reason = str(error).splitlines()[0]
        return [f"teacher.weights: {weights} is not a state_dict that loads with weights_only=True: {reason}"]
    if not isinstance(state, Mapping):
        return [f"teacher.weights: {weights} holds a {type(state).__name__}, not a state_dict"]
    try:
        fault = check_weights(teacher.arch, state, **numbers)
    except ValueError as error:
        return [f"teacher.arch: {error}"]
    return [f"teacher.weights: {weights} does not fit {teacher.arch}: {fault}"] if fault else []
