"""Stage `plan`: list P, U and test, count their rows, cut them into units."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.config import ConfigError, SourceConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.faults import BROKEN, one_line
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.reading import content_hash, read_rows
from pukd_ray.corpus.rows import row_id
from pukd_ray.corpus.sources import list_source, sources_by_role
from pukd_ray.corpus.units import Measured, Owner, Unit, clip, regroup, units_from_table, units_to_table
from pukd_ray.errors import PlaceError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import say
from pukd_ray.runtime.environment import describe_environment
from pukd_ray.storage import is_local, patiently

FILES_PER_TASK = 256
BYTES_PER_TASK = 256 << 20
"""Of formats whose files are read as a whole in order to count them."""
KINDS_SHOWN = 5

FILES_SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("source", pa.int32()),
        ("format", pa.string()),
        ("uri", pa.string()),
        ("relative", pa.string()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
    ]
)


@dataclass(frozen=True)
class Listing:
    """All files of all sources as `files.parquet` holds them, and remarks for the user."""

    table: pa.Table
    remarks: tuple[str, ...]


def list_inputs(sources: dict[str, tuple[SourceConfig, ...]]) -> Listing:
    """List every source. ConfigError with all faults at once."""
    rows: list[dict[str, object]] = []
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
            rows += [{"role": role, "source": index, "format": format_name, **vars(file)} for file in files]
    if faults:
        raise ConfigError(faults)
    return Listing(pa.Table.from_pylist(rows, schema=FILES_SCHEMA), tuple(remarks))


@dataclass(frozen=True)
class Drift:
    """How the files differ from those planned."""

    added: int
    faults: tuple[str, ...]
    gone: frozenset[str] = frozenset()
    """URIs of corpus files that are no longer listed."""


def compare_listing(planned: pa.Table, listing: pa.Table) -> Drift:
    """New corpus files are welcome, and some may go; files that changed, and any change of P or test, are faults."""

    def index(table: pa.Table) -> dict[tuple[str, int, str], tuple[int, str]]:
        return {_file_key(r): (r["size"], r["mtime"]) for r in table.to_pylist()}

    before, now = index(planned), index(listing)
    faults, gone = [], set()
    for (role, source, uri), stamp in before.items():
        current = now.get((role, source, uri))
        if current is None and role == "corpus":
            gone.add(uri)
        elif current is None:
            faults.append(f"{role}: {uri} was planned and is gone")
        elif current != stamp:
            faults.append(f"{role}: {uri} has changed since it was planned")
    added = now.keys() - before.keys()
    faults += [f"{role}: {uri} is new" for role, _, uri in sorted(added) if role != "corpus"]
    return Drift(len(added), tuple(faults), frozenset(gone))


def measure(file: SourceFile, format_name: str, source: SourceConfig) -> FileFacts:
    """Count the rows of `file`, if possible without reading its pixels; one that is no such file is one bad row.

    PlaceError if its storage fails: the plan is then not made.
    """
    form = FORMATS[format_name]
    if is_local(file.uri) and not file.mtime:
        what = "a link to nothing" if Path(file.uri).is_symlink() else "a name that is no UTF-8, or no access"
        return FileFacts(((1, file.size),), error=f"io: {what}")
    if file.size == 0 and not form.single_images:
        return FileFacts(((1, 0),), error="empty: the file has no bytes")
    try:
        return form.measure(file, source)
    except (*BROKEN, struct.error, ValueError) as error:
        return FileFacts(((1, file.size),), error=f"corrupt: not a readable {format_name} file: {one_line(error)}")


def make_units(role: str, index: int, source: SourceConfig, format_name: str, files: Sequence[Measured]) -> list[Unit]:
    """Cut measured files (with the prefix of their image ids) into units, in order; applies `source.rows`."""
    owner = Owner(role, index, format_name)
    units: list[Unit] = []
    for broken, some in groupby(files, key=lambda measured: measured[1].error is not None):
        if broken:
            units += (owner.unit([m], 0, m[1].rows, error=m[1].error) for m in some if m[1].rows)
        else:
            units += FORMATS[format_name].cut(owner, list(some))
    return units if source.rows is None else clip(units, *source.rows)


@ray.remote(num_cpus=0.25)
def _measure_files(files: list[SourceFile], format_name: str, source: SourceConfig) -> list[FileFacts]:
    return [measure(file, format_name, source) for file in files]


def plan_run(run: RunContext) -> dict[str, int]:
    """Run the stage; returns image counts per role."""
    assert run.listing is not None
    sources = sources_by_role(run.config)
    counts = plan_inputs(run.folder, sources, run.listing, lambda text: say(f"          warning: {text}"))
    run.folder.write_json("environment.json", describe_environment(run.cluster))
    return counts


def plan_inputs(
    folder: RunFolder, sources: dict[str, tuple[SourceConfig, ...]], listing: pa.Table, tell: Callable[[str], None]
) -> dict[str, int]:
    """Measure the files that are not in `plan.parquet` yet and append their units; returns image counts per role."""
    known: list[Unit] = []
    planned: set[tuple[str, int, str]] = set()
    only: set[tuple[str, int, str]] | None = None
    if folder.exists("plan.parquet") and folder.exists("files.parquet"):
        known = units_from_table(folder.read_table("plan.parquet"))
        before = folder.read_table("files.parquet")
        planned = {_file_key(r) for r in before.to_pylist()}
        new = [r for r in listing.to_pylist() if _file_key(r) not in planned]
        # Planned files stay first, so that their ids stay as they are.
        listing = pa.concat_tables([before, pa.Table.from_pylist(new, schema=FILES_SCHEMA)])
        # `rows` counts over all files of a source, so these are all measured again.
        grown = {(r["role"], r["source"]) for r in new if sources[r["role"]][r["source"]].rows is not None}
        only = {_file_key(r) for r in listing.to_pylist() if (r["role"], r["source"]) in grown} | {
            _file_key(r) for r in new
        }
    # What a run wrote that stopped short of `files.parquet` is planned too.
    planned |= {(unit.role, unit.source, file) for unit in known for file in unit.files}
    units = known + [u for unit in measure_units(sources, listing, tell, only) for u in _not_planned(unit, planned)]
    _check_overlap(units)
    units = _mark_repeated_ids(units, sources)
    counts = Counter[str]()
    for unit in units:
        counts[unit.role] += unit.rows
    for role in sources:
        if not counts[role]:
            raise ConfigError([f"{role}: its files hold no images: check {role}.uri"])
    folder.write_table("plan.parquet", units_to_table(units))
    folder.write_table("files.parquet", listing)  # last: without it the plan is made anew
    return dict(counts)


def _not_planned(unit: Unit, planned: set[tuple[str, int, str]]) -> list[Unit]:
    """`unit` with its new files only: where `rows` counts again, a group of images may begin with planned ones."""
    new = [i for i, file in enumerate(unit.files) if (unit.role, unit.source, file) not in planned]
    if len(new) == len(unit.files):
        return [unit]
    return [regroup([(unit, i) for i in new])] if new else []


def _file_key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["role"], row["source"], row["uri"]


def measure_units(
    sources: dict[str, tuple[SourceConfig, ...]],
    listing: pa.Table,
    tell: Callable[[str], None],
    only: set[tuple[str, int, str]] | None = None,
) -> list[Unit]:
    """Units of the listed files (of those in `only`, if given); `tell` hears of files that cannot be read."""
    prefixes = _id_prefixes(listing)
    units: list[Unit] = []
    rows = [r for r in listing.to_pylist() if only is None or _file_key(r) in only]
    for role, many in sources.items():
        for index, source in enumerate(many):
            mine = [r for r in rows if r["role"] == role and r["source"] == index]
            if not mine:
                continue
            files = [SourceFile(r["uri"], r["relative"], r["size"], r["mtime"]) for r in mine]
            facts = _measure_all(files, mine[0]["format"], source)
            news = [
                fact.note or f"{file.uri}: {fact.error}"
                for file, fact in zip(files, facts, strict=True)
                if fact.note or fact.error
            ]
            for text in news[:KINDS_SHOWN]:
                tell(text)
            if len(news) > KINDS_SHOWN:
                tell(f"{role}: and {len(news) - KINDS_SHOWN:,} files more of which there is something to say")
            if all((fact.error or "").startswith("unsupported:") for fact in facts):
                raise ConfigError([f"{role}: {files[0].uri}: {facts[0].error}"])
            ids = [prefixes[role, index, file.uri] for file in files]
            units += make_units(role, index, source, mine[0]["format"], list(zip(files, facts, ids, strict=True)))
    return units


def _measure_all(files: list[SourceFile], format_name: str, source: SourceConfig) -> list[FileFacts]:
    if FORMATS[format_name].single_images:
        return [measure(file, format_name, source) for file in files]  # one row each: nothing to read
    batches: list[list[SourceFile]] = [[]]
    size = 0
    for file in files:
        size += file.size if FORMATS[format_name].read_to_count else 0
        if batches[-1] and (len(batches[-1]) >= FILES_PER_TASK or size > BYTES_PER_TASK):
            batches.append([])
            size = file.size
        batches[-1].append(file)
    return [f for facts in ray.get([_measure_files.remote(b, format_name, source) for b in batches]) for f in facts]


def _id_prefixes(listing: pa.Table) -> dict[tuple[str, int, str], str]:
    """Prefix of each file's image ids: its relative path; if an earlier file has the same, with a hash of its URI."""
    owner: dict[tuple[str, str], str] = {}
    prefixes = {}
    for r in listing.to_pylist():
        first = owner.setdefault((r["role"], r["relative"]), r["uri"])
        mark = "" if first == r["uri"] else f"~{content_hash(r['uri'].encode()) % 2**64:016x}"
        prefixes[_file_key(r)] = r["relative"] + mark
    return prefixes


def _check_overlap(units: list[Unit]) -> None:
    """Two sources must not hold the same rows: every corpus image counts once."""
    ends: dict[str, tuple[int, int]] = {}
    for unit in sorted((u for u in units if u.role == "corpus"), key=lambda u: u.start):
        for file in unit.files:
            end, source = ends.get(file, (0, unit.source))
            if unit.start < end:
                raise ConfigError(
                    [f"corpus.{unit.source}: {file} is in corpus.{source} too; use `rows` to keep them apart"]
                )
            ends[file] = (unit.start + max(unit.rows if len(unit.files) == 1 else 1, 1), unit.source)


@ray.remote(num_cpus=0.25)
def _id_hashes(numbers: list[int], units: list[Unit], source: SourceConfig, parts: int) -> list[np.ndarray]:
    """(id hash, whether it is the user's, unit number, row) of every row, uint64 [n, 4], split by hash."""
    rows = []
    for number, unit in zip(numbers, units, strict=True):
        for row in read_rows(replace(unit, repeated=()), source, images=False):
            given = FORMATS[unit.format].has_id_column and row.image_id != row_id(unit, row.row)
            rows.append((content_hash(row.image_id.encode()) % 2**64, given, number, row.row))
    table = np.array(rows, dtype=np.uint64).reshape(-1, 4)
    pieces = [table[table[:, 0] % parts == p] for p in range(parts)]
    return pieces if parts > 1 else pieces[0]


@ray.remote(num_cpus=0.25)
def _repeats(*pieces: np.ndarray) -> np.ndarray:
    """(unit number, row) of each user's id that an earlier row has, or any row of which it is the made-up id."""
    table = np.concatenate(pieces)
    table = table[np.lexsort(table.T[::-1])]
    again = np.r_[False, table[1:, 0] == table[:-1, 0]]  # made-up ids come first and do not repeat each other
    return table[again][:, 2:]


def _mark_repeated_ids(units: list[Unit], sources: dict[str, tuple[SourceConfig, ...]]) -> list[Unit]:
    """Find repeated user ids over the whole corpus by a shuffle on their hashes; pixels are not read."""
    corpus = sources["corpus"]
    if all(source.id_column is None for source in corpus):
        return units
    jobs: list[tuple[list[int], SourceConfig]] = []
    for index, source in enumerate(corpus):
        mine = [i for i, u in enumerate(units) if u.role == "corpus" and u.source == index and not u.error]
        jobs += [(mine[i : i + 64], source) for i in range(0, len(mine), 64)]
    parts = 1 + sum(units[i].rows for chosen, _ in jobs for i in chosen) // 20_000_000
    hashed = [
        _id_hashes.options(num_returns=parts).remote(chosen, [units[i] for i in chosen], source, parts)
        for chosen, source in jobs
    ]
    columns: Sequence[Sequence[ray.ObjectRef]] = [[h] if parts == 1 else h for h in hashed]
    repeats: dict[int, list[int]] = {}
    for table in ray.get([_repeats.remote(*(pieces[p] for pieces in columns)) for p in range(parts)]):
        for number, row in table.tolist():
            repeats.setdefault(number, []).append(row)
    # A unit planned by an earlier run keeps its marks: no later one comes before it.
    return [replace(u, repeated=tuple(sorted({*u.repeated, *repeats.get(i, [])}))) for i, u in enumerate(units)]
