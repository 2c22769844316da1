"""Stage `plan`: the files of P, U and test counted and cut into units."""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pukd_ray.config import ConfigError, SourceConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.faults import BROKEN, one_line
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.listing import FILES_SCHEMA, NO_KEYS, numbers, places, read_files
from pukd_ray.corpus.reading import content_hash, read_rows, with_truth_label
from pukd_ray.corpus.rows import row_id
from pukd_ray.corpus.sources import expand_braces, sources_by_role
from pukd_ray.corpus.stored_units import PLAN
from pukd_ray.corpus.tables import conform, pieces, read_groups, spool, write_groups
from pukd_ray.corpus.units import UNIT_SCHEMA, Measured, Owner, Unit, clip, regroup, units_from_table, units_to_table
from pukd_ray.errors import MissingError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import say
from pukd_ray.runtime.environment import describe_environment
from pukd_ray.storage import is_local

FILES_PER_TASK = 256
BYTES_PER_TASK = 256 << 20
"""Of formats whose files are read as a whole in order to count them."""
TASKS_AHEAD = 64
"""That measure files, beyond the one whose turn it is: what they found waits in the object store."""
UNITS_AT_ONCE = 64
"""Made into a table, of sources whose rows are counted."""
NEWS_TOLD = 5
"""Of each source, one by one."""
TRUTH_UNITS = 16
TRUTH_ROWS = 64
"""Of so many units, in which a label of `relevant_labels` is looked for: to see all, the corpus is read once more."""

_as_units = conform(
    UNIT_SCHEMA,
    {
        "n_files": lambda units: pc.list_value_length(units.column("files")),
        "first_file": lambda units: pc.list_element(units.column("files"), 0),
        "lowest_file": lambda units: pa.array(map(min, units.column("files").to_pylist()), pa.string()),
        "highest_file": lambda units: pa.array(map(max, units.column("files").to_pylist()), pa.string()),
    },
)


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
        return form.measure(file, with_truth_label(source))
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
    return units if source.rows is None else list(clip(units, *source.rows))


@dataclass(frozen=True)
class _Cut:
    """What came of some files of a source."""

    units: pa.Table
    news: list[str]
    """What there is to say of the first of them."""
    n_news: int
    unsupported: str | None
    """Why the first cannot be read, if none of them can for such a reason."""


def _cut_files(files: pa.Table, marked: np.ndarray, role: str, index: int, source: SourceConfig) -> _Cut:
    """Measure some files of one source, and cut them into units of all of their rows.

    Image ids begin with a file's relative path; of files at `marked`, int64 [n], with a hash of its URI too.
    """
    format_name = files.column("format")[0].as_py()
    columns = (files.column(name).to_pylist() for name in ("uri", "relative", "size", "mtime"))
    mine = list(map(SourceFile, *columns))
    names = [file.relative for file in mine]
    for row in marked.tolist():
        names[row] += f"~{content_hash(mine[row].uri.encode()) % 2**64:016x}"
    facts = [measure(file, format_name, source) for file in mine]
    news = [
        fact.note or f"{f.uri}: {fact.error}" for f, fact in zip(mine, facts, strict=True) if fact.note or fact.error
    ]
    hopeless = all((fact.error or "").startswith("unsupported:") for fact in facts)
    measured = list(zip(mine, facts, names, strict=True))
    units = make_units(role, index, replace(source, rows=None), format_name, measured)
    first = f"{mine[0].uri}: {facts[0].error}" if hopeless else None
    return _Cut(units_to_table(units), news[:NEWS_TOLD], len(news), first)


_cut_in_task = ray.remote(num_cpus=0.25)(_cut_files)


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
    known = UNIT_SCHEMA.empty_table()
    planned = NO_KEYS
    grown: set[tuple[str, int]] = set()
    files = listing
    if folder.exists(PLAN) and folder.exists("files.parquet"):
        known = spool(map(_as_units, read_groups(folder, PLAN)), UNIT_SCHEMA)
        before = read_files(folder)
        planned = np.sort(numbers(before, "key"))
        new = spool((p.filter(~places(planned, numbers(p, "key"))[1]) for p in pieces(listing)), FILES_SCHEMA)
        # Planned files stay first, so that their ids stay as they are.
        files = spool(chain(pieces(before), pieces(new)), FILES_SCHEMA)
        # `rows` counts over all files of a source, so these are all measured again.
        grown = {pair for pair in _sources_of(new) if sources[pair[0]][pair[1]].rows is not None}
        # What a run wrote that stopped short of `files.parquet` is planned too.
        planned = np.union1d(planned, np.concatenate([_unit_keys(p) for p in pieces(known)] or [NO_KEYS]))
    cut = _cut_sources(sources, files, tell, planned, grown)
    units = _mark_repeated_ids(spool(chain(pieces(known), cut), UNIT_SCHEMA), sources)
    _check_ids(piece.column("unit_id").to_pylist() for piece in pieces(units.select(["unit_id"])))
    _check_overlap(units, files, sources)
    _check_truth(units.slice(len(known)), sources, tell)  # of those planned before, files may be gone
    counts = Counter[str]()
    for piece in pieces(units):
        for role, rows in zip(piece.column("role").to_pylist(), piece.column("rows").to_pylist(), strict=True):
            counts[role] += rows
    for role in sources:
        if not counts[role]:
            raise ConfigError([f"{role}: its files hold no images: check {role}.uri"])
    write_groups(folder, PLAN, units)
    write_groups(folder, "files.parquet", files)  # last: without it the plan is made anew
    return dict(counts)


def _sources_of(files: pa.Table) -> set[tuple[str, int]]:
    """(role, number) of the sources that have any of the files."""
    found = files.select(["role", "source"]).group_by(["role", "source"]).aggregate([])
    return set(zip(*(column.to_pylist() for column in found.columns), strict=True))


def _unit_keys(units: pa.Table) -> np.ndarray:
    """Keys of the files of units."""
    columns = (units.column(name).to_pylist() for name in ("role", "source", "files"))
    units_files = zip(*columns, strict=True)
    keys = [content_hash(f"{role}/{source}/{uri}".encode()) for role, source, uris in units_files for uri in uris]
    return np.array(keys, np.int64)


def measure_units(
    sources: dict[str, tuple[SourceConfig, ...]], listing: pa.Table, tell: Callable[[str], None]
) -> list[Unit]:
    """Units of the listed files; `tell` hears of files that cannot be read."""
    units = [unit for table in _cut_sources(sources, listing, tell) for unit in units_from_table(table)]
    _check_ids([[unit.unit_id for unit in units]])
    return units


def _cut_sources(
    sources: dict[str, tuple[SourceConfig, ...]],
    files: pa.Table,
    tell: Callable[[str], None],
    planned: np.ndarray = NO_KEYS,
    grown: Collection[tuple[str, int]] = (),
) -> Iterator[pa.Table]:
    """Units of `files`, in order, as tables: but for those whose key is `planned` (sorted).

    Of sources in `grown`, whose `rows` count over all files, the planned ones are counted too.
    """
    marked = _same_names(sources, files)
    for role, many in sources.items():
        for index, source in enumerate(many):
            again = (role, index) in grown
            mine = partial(_files_of, files, role, index, NO_KEYS if again else planned)
            cut = _cut_source(mine, marked, role, index, source, tell)
            if source.rows is None:
                yield from cut
                continue
            kept = clip((unit for table in cut for unit in units_from_table(table)), *source.rows)
            new = (u for unit in kept for u in (_not_planned(unit, planned) if again else [unit]))
            while some := list(islice(new, UNITS_AT_ONCE)):
                yield units_to_table(some)


def _files_of(files: pa.Table, role: str, index: int, without: np.ndarray) -> Iterator[pa.Table]:
    """Those of a source, in pieces, whose key is not in `without` (sorted)."""
    for piece in pieces(files):
        mine = pc.and_(pc.equal(piece.column("role"), role), pc.equal(piece.column("source"), index))
        piece = piece.filter(mine)
        if len(without):
            piece = piece.filter(~places(without, numbers(piece, "key"))[1])
        if len(piece):
            yield piece


def _cut_source(
    files: Callable[[], Iterator[pa.Table]],
    marked: np.ndarray,
    role: str,
    index: int,
    source: SourceConfig,
    tell: Callable[[str], None],
) -> Iterator[pa.Table]:
    """Units of the files of one source, with all of their rows."""
    told, news, hopeless = 0, 0, []
    for cut in _cut_batches(files(), marked, role, index, source):
        for text in cut.news[: NEWS_TOLD - told]:
            tell(text)
            told += 1
        news += cut.n_news
        hopeless.append(cut.unsupported)
        if len(cut.units):
            yield cut.units
    if news > told:
        tell(f"{role}: and {news - told:,} files more of which there is something to say")
    if hopeless and all(hopeless):
        raise ConfigError([f"{role}: {hopeless[0]}"])


def _cut_batches(
    files: Iterator[pa.Table], marked: np.ndarray, role: str, index: int, source: SourceConfig
) -> Iterator[_Cut]:
    """By tasks, in order, some ahead; single images, which need not be looked at, here if they are few."""

    def rows_of(batch: pa.Table) -> np.ndarray:
        return np.flatnonzero(places(marked, numbers(batch, "key"))[1])

    waiting: deque[ray.ObjectRef] = deque()
    batches = _batches(files)
    first = next(batches, None)
    if first is None:
        return
    second = next(batches, None)
    if second is None and FORMATS[first.column("format")[0].as_py()].single_images:
        yield _cut_files(first, rows_of(first), role, index, source)
        return
    for batch in chain([first], [second] if second else [], batches):
        waiting.append(_cut_in_task.remote(batch, rows_of(batch), role, index, source))
        if len(waiting) > TASKS_AHEAD:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _batches(files: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Files for a task each."""
    for piece in files:
        form = FORMATS[piece.column("format")[0].as_py()]
        if form.single_images:
            yield piece
            continue
        start = size = 0
        for at, more in enumerate(piece.column("size").to_pylist() if form.read_to_count else [0] * len(piece)):
            if at > start and (at - start >= FILES_PER_TASK or size + more > BYTES_PER_TASK):
                yield piece.slice(start, at - start)
                start, size = at, 0
            size += more
        yield piece.slice(start)


def _not_planned(unit: Unit, planned: np.ndarray) -> list[Unit]:
    """`unit` with its new files only: where `rows` counts again, a group of images may begin with planned ones."""
    keys = np.array([content_hash(f"{unit.role}/{unit.source}/{file}".encode()) for file in unit.files], np.int64)
    new = np.flatnonzero(~places(planned, keys)[1]).tolist()
    if len(new) == len(unit.files):
        return [unit]
    return [regroup([(unit, i) for i in new])] if new else []


def _same_names(sources: dict[str, tuple[SourceConfig, ...]], files: pa.Table) -> np.ndarray:
    """Keys, sorted, of files whose relative path an earlier file of their role has: from another folder."""
    found = [NO_KEYS]
    for role, many in sources.items():
        if len(many) > 1 or len(expand_braces(many[0].uris)) > 1:
            names, keys = [NO_KEYS], [NO_KEYS]
            for piece in pieces(files):
                piece = piece.filter(pc.equal(piece.column("role"), role))
                names.append(
                    np.array([content_hash(n.encode()) for n in piece.column("relative").to_pylist()], np.int64)
                )
                keys.append(numbers(piece, "key"))
            repeated = np.ones(sum(map(len, names)), bool)
            repeated[np.unique(np.concatenate(names), return_index=True)[1]] = False
            found.append(np.concatenate(keys)[repeated])
    return np.sort(np.concatenate(found))


def _check_ids(names: Iterable[Sequence[str]]) -> None:
    """RuntimeError if two units have one id: what is kept by it, labels and scores, would be of one of them."""
    hashes = [np.array([content_hash(name.encode()) for name in some], np.int64) for some in names]
    total = sum(map(len, hashes))
    if (twice := total - len(np.unique(np.concatenate([NO_KEYS, *hashes])))) > 0:
        raise RuntimeError(f"the plan has {twice:,} unit ids twice: --redo plan makes it anew")


@ray.remote(num_cpus=0.25)
def _labels_of(unit: Unit, source: SourceConfig) -> list[tuple[bool | None, str | None]]:
    """(truth, label) of some rows."""
    positions = np.unique(np.linspace(0, unit.rows - 1, TRUTH_ROWS).astype(np.int64))
    rows = read_rows(unit, source, positions, images=False)
    return [(row.relevant, None if row.label is None else str(row.label)) for row in rows]


def _check_truth(units: pa.Table, sources: dict[str, tuple[SourceConfig, ...]], tell: Callable[[str], None]) -> None:
    """Tell of corpus sources in which no label is one of `relevant_labels`, as far as some rows show."""
    corpus = sources.get("corpus", ())
    for index, source in enumerate(corpus):
        if source.relevant_labels is None:
            continue
        mine = pc.and_(pc.equal(units.column("role"), "corpus"), pc.equal(units.column("source"), index))
        mine = pc.and_(mine, pc.is_null(units.column("error")))
        places_of = np.flatnonzero(mine.to_numpy())
        spread = np.unique(np.linspace(0, len(places_of) - 1, TRUTH_UNITS).astype(np.int64))[: len(places_of)]
        some = [unit for at in places_of[spread].tolist() for unit in units_from_table(units.slice(at, 1))]
        found = [row for rows in ray.get([_labels_of.remote(unit, source) for unit in some]) for row in rows]
        if not found or any(relevant for relevant, _ in found):
            continue
        labels = [label for label, _ in Counter(label for _, label in found if label is not None).most_common(5)]
        key = "corpus" if len(corpus) == 1 else f"corpus.{index}"
        tell(
            f"{key}: of {len(found):,} images looked at none has a label of relevant_labels: "
            + (f"theirs are such as {', '.join(label[:40] for label in labels)}" if labels else "they have no label")
        )


def _check_overlap(units: pa.Table, files: pa.Table, sources: dict[str, tuple[SourceConfig, ...]]) -> None:
    """Two sources must not hold the same rows: every corpus image counts once."""
    if len(sources.get("corpus", ())) < 2:
        return
    hashes = [NO_KEYS]
    for piece in pieces(files):
        uris = piece.filter(pc.equal(piece.column("role"), "corpus")).column("uri").to_pylist()
        hashes.append(np.array([content_hash(uri.encode()) for uri in uris], np.int64))
    found, times = np.unique(np.concatenate(hashes), return_counts=True)
    twice = set(found[times > 1].tolist())
    if not twice:
        return
    shared = [
        (unit, file)
        for piece in pieces(units)
        for unit in units_from_table(piece.filter(pc.equal(piece.column("role"), "corpus")))
        for file in unit.files
        if content_hash(file.encode()) in twice
    ]
    ends: dict[str, tuple[int, int]] = {}
    for unit, file in sorted(shared, key=lambda pair: pair[0].start):
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
        # Ids of a planned file that is gone bind nobody; one that should be there the scoring misses.
        with suppress(MissingError):
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


def _mark_repeated_ids(table: pa.Table, sources: dict[str, tuple[SourceConfig, ...]]) -> pa.Table:
    """Find repeated user ids over the whole corpus by a shuffle on their hashes; pixels are not read."""
    corpus = sources.get("corpus", ())
    if all(source.id_column is None for source in corpus):
        return table
    units = units_from_table(table)
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
    for table in ray.get([_repeats.remote(*(column[p] for column in columns)) for p in range(parts)]):
        for number, row in table.tolist():
            repeats.setdefault(number, []).append(row)
    # A unit planned by an earlier run keeps its marks: no later one comes before it.
    marked = (replace(u, repeated=tuple(sorted({*u.repeated, *repeats.get(i, [])}))) for i, u in enumerate(units))
    return units_to_table(marked)
