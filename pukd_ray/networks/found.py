"""Weights as they are found: the entries of a checkpoint that are a network's, whatever lies around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NESTING = 3  # mappings in mappings that are looked into


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
    for path, mapping in _mappings(checkpoint):
        tensors = {
            name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)
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


def _mappings(checkpoint: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, checkpoint
    if depth < NESTING:
        for key, value in checkpoint.items():
            if isinstance(value, Mapping):
                yield from _mappings(value, f"{path}.{key}" if path else str(key), depth + 1)


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
