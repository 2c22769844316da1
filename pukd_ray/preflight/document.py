"""The config as a YAML document: read, overridden key by key, written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pukd_ray.config import ConfigError, RunConfig, to_plain


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: 1e-3 is a number, 010 is ten; `no`, `on`, 1:30 and dates are text; a key
    that is there twice is a fault."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Looks at the keys before PyYAML drops all but the last of a name."""
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if first := seen.get((key.tag, key.value)):
                problem = f"the key {key.value} is there twice, on line {first} too"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.tag, key.value] = key.start_mark.line + 1
        return node


_SIXTIES = ("tag:yaml.org,2002:str", re.compile(r"[^:]*:"))
_Loader.yaml_implicit_resolvers = {
    first: [_SIXTIES] * (first in "-+0123456789")
    + [
        (tag, form)
        for tag, form in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and not (tag == "tag:yaml.org,2002:bool" and first not in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))
_INT = ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0o[0-7]+|\d+)$"), list("-+0123456789"))
for _form in (_FLOAT, _INT):
    _Loader.add_implicit_resolver(*_form)
    _Dumper.add_implicit_resolver(*_form)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0 if re.match(r"[-+]?0[box]", text) else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


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


def read_document(path: Path) -> dict[str, Any]:
    """The file's keys and values; ConfigError if it holds nothing of the kind."""
    try:
        return parse_document(path.read_text(), f"--config: {path}")
    except OSError as error:
        raise ConfigError([f"--config: cannot read {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config: {path} is not YAML: {error}"]) from error


def parse_document(text: str, what: str) -> dict[str, Any]:
    """The same of a text; `what` begins the fault."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = f" line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ConfigError([f"{what}{where} is not YAML: {getattr(error, 'problem', error)}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"{what} must hold keys and values"])
    return {str(key): value for key, value in raw.items()}


def build_on(base: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `raw` sets: sections key by key, all else, lists too, as a whole."""
    merged = dict(base)
    for key, value in raw.items():
        below = merged.get(key)
        merged[key] = build_on(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Set each `key.sub` (items of lists by number) in place; returns the faults of keys that lead nowhere."""
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
