"""Everything about a config that can be checked before Ray starts, all faults in one go."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import yaml
from pydantic import TypeAdapter, ValidationError

from pukd_ray.config import (
    NEEDED_BY_RULES,
    ConfigError,
    DistillConfig,
    PaperConfig,
    ResourcesConfig,
    RunConfig,
    SelectorConfig,
    StudentConfig,
    TeacherTrainingConfig,
    to_plain,
    worker_faults,
)
from pukd_ray.corpus.sources import check_reachable
from pukd_ray.storage import is_local, open_storage, read_bytes

T = TypeVar("T")

SOURCE_KEYS = ("positives", "corpus", "test", "train", "original")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: 1e-3 is a number; `no`, `on` and dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, form)
        for tag, form in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and not (tag == "tag:yaml.org,2002:bool" and first not in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML file, apply `overrides` such as `{"selector.prior": 0.2}`, check all that can be checked.

    Input paths become absolute (relative ones resolve against the file's folder); `output` is left as it is.
    Raises ConfigError whose `faults` has one line per fault, each naming its key.
    """
    return _load(path, overrides, RunConfig)


def load_teacher_training(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TeacherTrainingConfig:
    """As `load_config`, for `jobs/train_teacher.py`; `teacher.weights` is an output there."""
    return _load(path, overrides, TeacherTrainingConfig)


def load_paper_table(path: str | Path, overrides: Mapping[str, Any] | None = None) -> PaperConfig:
    """As `load_config`, for `jobs/paper_table.py`; with `teacher_training` the weights need not be there yet."""
    config = _load(path, overrides, PaperConfig)
    faults = [
        f"table.more.{i}.{section}.{fault}"
        for i, row in enumerate(config.table.more)
        for section, changes in (("selection", row.selection), ("distill", row.distill))
        for fault in _validate({**to_plain(getattr(config, section)), **changes}, type(getattr(config, section)))[1]
    ]
    if faults:
        raise ConfigError(faults)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads again."""
    text: str = yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_value(text: str) -> Any:
    """A command-line value by YAML's rules; nothing at all is empty text, not null."""
    try:
        return yaml.load(text, Loader=_Loader) if text else text
    except yaml.YAMLError:
        return text


def _load(path: str | Path, overrides: Mapping[str, Any] | None, kind: type[T]) -> T:
    raw = _read_yaml(Path(path))
    faults = _apply(raw, overrides or {})
    raw = _resolve_paths(raw, Path(path).absolute().parent)
    faults += _resolve_classes(raw)
    config, value_faults = _validate(raw, kind)
    for key in overrides or {}:  # of an override, name all of the key that was given
        value_faults = [
            f"{key}: unknown key" if f.endswith(": unknown key") and key.startswith(f.partition(":")[0] + ".") else f
            for f in value_faults
        ]
    faults += value_faults
    at_fault = {fault.partition(":")[0] for fault in faults}
    if issubclass(kind, RunConfig) and config is None:
        faults += _worker_faults(raw, at_fault)
    weights = teacher.get("weights") if isinstance(teacher := raw.get("teacher"), dict) else None
    writes_teacher = kind is TeacherTrainingConfig or (
        bool(raw.get("teacher_training")) and not (isinstance(weights, str) and weights and weights_exist(weights))
    )
    faults += _file_faults(raw, at_fault, writes_teacher=writes_teacher, has_student=issubclass(kind, RunConfig))
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
        node: Any = raw if all([*parents, last]) else None
        for part in parents:
            if isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
            else:
                node = node[int(part)] if _is_item(node, part) else None
        if isinstance(node, dict):
            node[last] = value
        elif _is_item(node, last):
            node[int(last)] = value
        else:
            hint = f"; its items are numbered 0 to {len(node) - 1}" if isinstance(node, list) and node else ""
            faults.append(f"{key}: there is no such key to set{hint}")
    return faults


def _is_item(node: Any, part: str) -> bool:
    return isinstance(node, list) and part.isdecimal() and int(part) < len(node)


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


def _validate(raw: Any, kind: Any) -> tuple[Any, list[str]]:
    try:
        return TypeAdapter(kind).validate_python(raw), []
    except ValidationError as error:
        return None, _readable(error, raw)


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


def _readable(error: ValidationError, raw: Any) -> list[str]:
    """One line per key; the branches of a union become one line."""
    said: dict[str, str] = {}
    should: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    lines: list[str] = []
    for item in error.errors(include_url=False):
        if not item["loc"] and item["type"] == "value_error":  # checks across sections name their keys
            lines += str(item["ctx"]["error"]).splitlines()
            continue
        key, value = _locate(item, raw)
        values[key] = value
        if item["type"] in _SAYS_ALL:
            said[key] = _SAYS_ALL[item["type"]]
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


def _locate(item: Any, raw: Any) -> tuple[str, Any]:
    """The key at fault as the user wrote it, and its value; pydantic's path has the branches of unions too."""
    parts, node = [], raw
    for part in item["loc"]:
        if isinstance(node, dict) and (part in node or (item["type"] == "missing" and part == item["loc"][-1])):
            node = node.get(part)
        elif isinstance(node, dict) and node is not raw and part in NEEDED_BY_RULES:
            node = None  # a default that is at fault
        elif isinstance(node, list) and isinstance(part, int) and (part < len(node) or item["type"] == "missing"):
            node = node[part] if part < len(node) else None
        else:
            continue
        parts.append(str(part))
    return ".".join(parts), node


def _expected(value: Any, options: list[str]) -> str:
    return f"{_shown(value)} should be {' or '.join(dict.fromkeys(options))}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _worker_faults(raw: dict[str, Any], at_fault: set[str]) -> list[str]:
    """The check across sections, where faults elsewhere kept the config from being put together."""
    keys = {"resources": "train_workers", "selector": "batch_size", "distill": "batch_size"}
    defaults = {"resources": ResourcesConfig(), "selector": SelectorConfig(), "distill": DistillConfig()}
    sections = {name: raw.get(name, {}) for name in keys}
    if any(not isinstance(sections[n], dict) or f"{n}.{key}" in at_fault for n, key in keys.items()):
        return []
    workers, selector, distill = (sections[n].get(key, getattr(defaults[n], key)) for n, key in keys.items())
    return worker_faults(workers, selector, distill)


def _file_faults(raw: dict[str, Any], at_fault: set[str], *, writes_teacher: bool, has_student: bool) -> list[str]:
    """Faults of files, for every part of the config that is well-formed enough to say which files it means."""

    def sound(section: Any, key: str, *names: str) -> bool:
        return isinstance(section, dict) and not any(
            fault == f"{key}.{name}" or fault.startswith(f"{key}.{name}.") for name in names for fault in at_fault
        )

    faults: list[str] = []
    for role in SOURCE_KEYS:
        many = raw[role] if isinstance(raw.get(role), list) else [raw.get(role)]
        for index, source in enumerate(many):
            key = f"{role}.{index}" if isinstance(raw.get(role), list) else role
            if sound(source, key, "uri"):
                uri = source["uri"]
                faults += check_reachable(tuple(uri) if isinstance(uri, list) else (uri,), key)
    teacher: Any = raw.get("teacher")
    student: Any = raw.get("student", {})
    state = None
    if not writes_teacher and sound(teacher, "teacher", "weights"):
        state, weights_faults = _read_weights(teacher["weights"])
        faults += weights_faults
    if not sound(teacher, "teacher", "num_classes", "channels", "input_size"):
        return faults
    numbers = {k: teacher.get(k, 3) for k in ("num_classes", "channels", "input_size")}  # channels has a default
    if sound(teacher, "teacher", "arch"):
        faults += _network_faults("teacher", teacher["arch"], numbers, state, teacher.get("weights", ""))
    if has_student and sound(student, "student", "arch"):
        faults += _network_faults("student", student.get("arch", StudentConfig().arch), numbers)
    return faults


def weights_exist(uri: str) -> bool:
    """Whether the file is there, or its storage cannot tell: reading it then says why."""
    try:
        fs, path = open_storage(uri)
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)
    except (ValueError, OSError):
        return True


def _read_weights(uri: str) -> tuple[Mapping[str, Any] | None, list[str]]:
    import torch  # takes seconds: only once there is something to check

    try:
        data = read_bytes(*open_storage(uri))
    except FileNotFoundError:
        return None, [f"teacher.weights: no such file: {uri}"]
    except (OSError, ValueError) as error:
        return None, [f"teacher.weights: cannot read {uri}: {error}"]
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, [f"teacher.weights: {uri} is not a state_dict that loads with weights_only=True: {reason}"]
    if not isinstance(state, Mapping):
        return None, [f"teacher.weights: {uri} holds a {type(state).__name__}, not a state_dict"]
    return state, []


def _network_faults(section: str, arch: str, numbers: dict[str, int], state: Any = None, uri: str = "") -> list[str]:
    """Faults of a network and, if there is a `state`, of weights that are to fit it."""
    from pukd_ray.networks.zoo import check_weights

    try:
        fault = check_weights(arch, {} if state is None else state, **numbers)
    except ValueError as error:
        return [f"{section}.arch: {error}"]
    return [f"{section}.weights: {uri}, arch {arch}: {fault}"] if fault and state is not None else []
