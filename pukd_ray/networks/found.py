"""Weights as they are found: files of tensors, and the entries of them that are a network's, whatever lies around."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NESTING = 3  # mappings in mappings that are looked into

# Names in files of torchvision that it changes while it loads them: a Transformer's since 0.13, DenseNet's since 0.2.
_OLD_NAMES = (
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    content: Mapping[str, Any]
    """Mappings of mappings of tensors and of plain values."""
    skipped: tuple[str, ...] = ()
    """Classes of the Python objects in it, which were not made."""


class _Inert:
    """Stands for an object of a file that is not made: whatever its pickle calls and sets, nothing happens."""

    def __new__(cls, *_args: Any, **_options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read_checkpoint(data: bytes) -> Checkpoint:
    """A file of torch or of safetensors. Nothing in it is executed: objects that are no tensors are skipped.

    ValueError with one line if there are no named tensors in it.
    """
    if data[8:9] == b"{":  # after the length of its header
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return Checkpoint(load(data))
        except SafetensorError as error:
            raise ValueError(f"is no whole file of safetensors: {error}") from error
    skipped: list[str] = []
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        skipped = _foreign(data)
        content = _load_without(data, skipped)
        if not isinstance(content, Mapping):
            reason = f"it holds objects of {', '.join(skipped[:3])}" if skipped else _plain(error)
            raise ValueError(
                f"is not a state_dict that loads with weights_only=True ({reason}): write one with "
                "torch.save(model.state_dict(), ...)"
            ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not a state_dict")
    return Checkpoint(content, tuple(skipped))


def _foreign(data: bytes) -> list[str]:
    """Names of what is not tensors or plain values in a file that is whole, as torch has written them since 1.6."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:
        return []


def _load_without(data: bytes, skipped: list[str]) -> Any:
    """The file with something inert in their places, or mappings, which can be filled; None if it cannot be read so."""
    made: list[OrderedDict[Any, Any]] = []

    class Filled:
        """Stands for an object that its pickle fills like a dict: torch fills nothing else than its own and this."""

        def __new__(cls, *_args: Any, **_options: Any) -> Any:
            made.append(OrderedDict())
            return made[-1]

    for stand_in in (_Inert, Filled) if skipped else ():
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name in skipped]):
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:
            continue
        for mapping in made:
            mapping.__dict__.clear()  # the object's attributes, which may hide a mapping's own: values, items
        hollow = isinstance(content, Mapping) and not content  # the whole file was one object, which filled nothing
        return None if hollow else content
    return None


def _plain(error: Exception) -> str:
    """A loader's reason in one line: without torch's advice to switch its check off or to widen it, and colours."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    said = re.search(r"WeightsUnpickler error: (.+)", text)
    plain = said[1] if said else next(iter(text.splitlines()), "")
    plain = re.sub(r"\.? Please use .*", "", plain)
    return plain if plain and "weights_only" not in plain else type(error).__name__


@dataclass(frozen=True)
class Found:
    """A part of a checkpoint that fits a network."""

    state: dict[str, Tensor]
    """By the network's own names."""
    taken: str
    """Where it lay and what it was called, in a few words; empty: the checkpoint was a plain state_dict."""


def parts_that_fit(shapes: Mapping[str, list[int]], checkpoint: Mapping[str, Any]) -> list[Found]:
    """All parts of `checkpoint` that hold a network's entries, whose shapes are given by name.

    A part is a mapping within it, at any key, and of that the entries whose names start alike (`module.`, `model.`,
    `_orig_mod.`, ...). It fits if every entry of the network is there with its shape, and no other. Two things may
    differ: one layer may have another name (the classifier: `fc`, `linear`, `head`, ...) if its entries are the only
    ones without a place and have the shapes of those that are missing, and auxiliary classifiers (`aux...`), which
    only a training uses, may be left over. Files older than PyTorch 0.4.1 lack BatchNorm's counters.
    """
    found = []
    renames = [(old, new) for old, new in _OLD_NAMES if not any(map(old.search, shapes))]
    for path, mapping in _mappings(checkpoint):
        tensors = {
            _as_now(name, renames): value
            for name, value in mapping.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        for prefix in _prefixes(shapes, tensors):
            inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            state, renamed = _renamed(shapes, inside)
            if state is None:
                continue
            words = [f"its {path!r}"] if path else []
            words += [f"names after {prefix!r}"] if prefix else []
            words += [renamed] if renamed else []
            found.append(Found(state, ", ".join(words)))
    return found


def row_counts(checkpoint: Mapping[str, Any]) -> list[int]:
    """Rows of its matrices, each number once, the last matrix's first: a classifier's are its classes."""
    values = [value for _, mapping in _mappings(checkpoint) for value in mapping.values()]
    matrices = [v for v in values if isinstance(v, Tensor) and v.dim() >= 2 and v.shape[2:].numel() == 1]
    return list(dict.fromkeys(len(matrix) for matrix in reversed(matrices)))


def _mappings(checkpoint: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, checkpoint
    if depth < NESTING:
        for key, value in checkpoint.items():
            if isinstance(value, Mapping):
                yield from _mappings(value, f"{path}.{key}" if path else str(key), depth + 1)


def _as_now(name: str, renames: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for old, new in renames:
        name = old.sub(new, name)
    return name


def _prefixes(shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What may stand before all names: nothing, or what stands before the network's first or last name."""
    ends = list(shapes)[:1] + list(shapes)[-1:]
    before = {name.removesuffix(end) for end in ends for name in tensors if name.endswith(f".{end}")}
    return ["", *sorted(before)]


def _renamed(shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor] | None, str]:
    """(the tensors by the network's names, or None if they do not fit; what was called otherwise)."""
    missing = [name for name in shapes if name not in tensors and not name.endswith("num_batches_tracked")]
    extra = [name for name in tensors if name not in shapes and not name.lower().startswith("aux")]
    layers = {name.rpartition(".")[0] for name in missing}, {name.rpartition(".")[0] for name in extra}
    state = {name: tensors[name] for name in shapes if name in tensors}
    renamed = ""
    if missing or extra:
        if len(layers[0]) != 1 or len(layers[1]) != 1:
            return None, ""
        (here,), (there,) = layers
        if {name.removeprefix(here) for name in missing} != {name.removeprefix(there) for name in extra}:
            return None, ""
        state |= {name: tensors[there + name.removeprefix(here)] for name in missing}
        renamed = f"{there!r} for {here!r}"
    if any(list(value.shape) != shapes[name] for name, value in state.items()):
        return None, ""
    return {name: state[name] for name in shapes if name in state}, renamed
