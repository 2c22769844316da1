"""The files of all sources: listed, told apart by keys, compared with those that were planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from pukd_ray.config import ConfigError, SourceConfig
from pukd_ray.corpus.reading import content_hash
from pukd_ray.corpus.sources import list_source
from pukd_ray.corpus.tables import conform, pieces, read_groups, spool
from pukd_ray.errors import PlaceError
from pukd_ray.run.folder import RunFolder
from pukd_ray.storage import patiently

KINDS_SHOWN = 5
"""Of names that are left out."""

FILES_SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("source", pa.int32()),
        ("format", pa.string()),
        ("uri", pa.string()),
        ("relative", pa.string()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
        ("key", pa.int64()),  # `file_keys`
    ]
)


def file_keys(table: pa.Table) -> pa.Array:
    """By which files are told apart: 64 bits of role, source and URI, int64 [n]."""
    columns = (table.column(name).to_pylist() for name in ("role", "source", "uri"))
    return pa.array([content_hash(f"{r}/{s}/{u}".encode()) for r, s, u in zip(*columns, strict=True)], pa.int64())


@dataclass(frozen=True)
class Listing:
    """All files of all sources as `files.parquet` holds them, and remarks for the user."""

    table: pa.Table
    """In a temporary file, as are all tables here that grow with the number of files."""
    remarks: tuple[str, ...]


def list_inputs(sources: dict[str, tuple[SourceConfig, ...]]) -> Listing:
    """List every source. ConfigError with all faults at once."""
    found: list[tuple[str, int, str, pa.Table]] = []
    faults: list[str] = []
    remarks: list[str] = []
    for role, many in sources.items():
        for index, source in enumerate(many):
            key = role if len(many) == 1 else f"{role}.{index}"
            try:
                format_name, files, left_out = patiently(", ".join(source.uris), partial(list_source, source, key))
            except ConfigError as error:
                faults += error.faults
                continue
            except (ValueError, PlaceError) as error:
                faults.append(f"{key}.uri: cannot be listed: {error}")
                continue
            if left_out:
                shown = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:KINDS_SHOWN]
                what = ", ".join(f"{n} {suffix[:40]}" for suffix, n in sorted(shown))
                if len(left_out) > len(shown):
                    what += f", and {left_out.total() - sum(n for _, n in shown):,} of other names"
                remarks.append(f"{key}: left out, not {format_name} by name: {what}")
            remarks += files.remarks
            found.append((role, index, format_name, files.table))
    if faults:
        raise ConfigError(faults)

    def tables() -> Iterator[pa.Table]:
        for role, index, format_name, table in found:
            for piece in pieces(table):
                same = {"role": role, "source": index, "format": format_name}
                for name, value in same.items():
                    piece = piece.append_column(
                        FILES_SCHEMA.field(name), pa.array([value] * len(piece), FILES_SCHEMA.field(name).type)
                    )
                yield _as_files(piece)

    return Listing(spool(tables(), FILES_SCHEMA), tuple(remarks))


_as_files = conform(FILES_SCHEMA, {"key": file_keys})


def read_files(folder: RunFolder) -> pa.Table:
    """`files.parquet`: the files as they were planned."""
    return spool(map(_as_files, read_groups(folder, "files.parquet")), FILES_SCHEMA)


@dataclass(frozen=True)
class Drift:
    """How the files differ from those planned."""

    added: int
    faults: tuple[str, ...]
    gone: frozenset[str] = frozenset()
    """URIs of corpus files that are no longer listed."""


def compare_listing(planned: pa.Table, listing: pa.Table) -> Drift:
    """New corpus files are welcome, and some may go; files that changed, and any change of P or test, are faults."""
    keys, stamps = numbers(planned, "key"), np.concatenate([_stamps(p) for p in pieces(planned)] or [NO_KEYS])
    order = np.argsort(keys)
    keys, stamps = keys[order], stamps[order]
    listed = np.zeros(len(keys), bool)
    added, gone = 0, set()
    changed: list[str] = []
    new: list[str] = []
    for piece in pieces(listing):
        mine = numbers(piece, "key")
        at, known = places(keys, mine)
        listed[at[known]] = True
        differs = np.zeros(len(mine), bool)
        differs[known] = stamps[at[known]] != _stamps(piece)[known]
        changed += [f"{role}: {uri} has changed since it was planned" for role, uri in _named(piece, differs)]
        added += int((~known).sum())
        new += [f"{role}: {uri} is new" for role, uri in _named(piece, ~known) if role != "corpus"]
    lost: list[str] = []
    if not listed.all():
        for piece in pieces(planned):
            at, _ = places(keys, numbers(piece, "key"))
            for role, uri in _named(piece, ~listed[at]):
                if role == "corpus":
                    gone.add(uri)
                else:
                    lost.append(f"{role}: {uri} was planned and is gone")
    return Drift(added, (*lost, *changed, *new), frozenset(gone))


NO_KEYS = np.zeros(0, np.int64)


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers, in memory."""
    found: np.ndarray = table.column(name).to_numpy()
    return found


def _stamps(table: pa.Table) -> np.ndarray:
    """Of size and time, int64 [n]; other stamps of a file are other ones but for a chance of 2^-64."""
    sizes, times = (table.column(name).to_pylist() for name in ("size", "mtime"))
    return np.array([content_hash(f"{s}/{t}".encode()) for s, t in zip(sizes, times, strict=True)], np.int64)


def places(keys: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in sorted `keys`, whether it is there) of each of `mine`."""
    at = np.searchsorted(keys, mine).clip(0, max(0, len(keys) - 1))
    return at, keys[at] == mine if len(keys) else np.zeros(len(mine), bool)


def _named(table: pa.Table, mask: np.ndarray) -> Iterator[tuple[str, str]]:
    """(role, URI) of some files."""
    if mask.any():
        some = table.select(["role", "uri"]).filter(mask)
        yield from zip(*(column.to_pylist() for column in some.columns), strict=True)
