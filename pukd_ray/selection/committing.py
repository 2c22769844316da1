"""How a chunk of the pass becomes final: attempts are written aside, checked, merged, and named by one manifest.

`attempts/<chunk>-<draw>/*.parquet`, a file per block: never changed, never read unless the ledger of the pass names it.
`scores/<chunk>-<draw>.parquet`, about 100,000 rows each: merged from an attempt whose rows are those of the plan.
`markers/score/<chunk>.json`: the manifest. It is written once, while its driver holds the run, and only if no other
driver has written it; what no manifest names does not exist, and is deleted when the stage ends.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pukd_ray.corpus.streaming import LedgerPart
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder, parquet_options, scores_schema
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.runtime.metrics import record
from pukd_ray.runtime.timing import Span
from pukd_ray.selection.drift import count_scores

ATTEMPTS = "attempts"
"""Folder of what chunks write before they are committed; gone when the stage ends."""
FILE_ROWS = 100_000
FILE_BYTES = 256 << 20
GROUP_ROWS = 20_000
GROUP_BYTES = 64 << 20
_LEDGER_SCHEMA = pa.schema(
    [("file", pa.string()), ("bytes", pa.int64()), *((name, pa.string()) for name in ("units", "reasons", "scores"))]
)


@dataclass(frozen=True)
class WriteScores:
    """Writes one file of an attempt at a chunk per block, and returns what is in it."""

    folder: RunFolder
    attempt: str
    """Folder to write into."""
    rules: tuple[str, ...]
    """Those with a column of their own."""
    edges: np.ndarray | None = None
    """Thresholds to count scores by; None where no unit is new to the selector's sample."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score rows -> one ledger row."""
        # A retried task writes under another name: files that no ledger row names are never looked at.
        name = f"{self.attempt}/{uuid.uuid4().hex[:12]}.parquet"
        schema = scores_schema(self.rules)
        scores = table.select(schema.names).cast(schema)
        self.folder.write_table(name, scores)
        units = Counter(table.column("unit").to_pylist())
        reasons = Counter(e.partition(":")[0] for e in table.column("error").to_pylist() if e is not None)
        counted = {} if self.edges is None else {unit: self._count(table, unit) for unit in units}
        ledger = {
            "file": name,
            "bytes": scores.nbytes,
            "units": json.dumps(units),
            "reasons": json.dumps(reasons),
            "scores": json.dumps(counted),
        }
        return pa.Table.from_pylist([ledger], schema=_LEDGER_SCHEMA)

    def _count(self, table: pa.Table, unit: str) -> list[float]:
        mine = table.filter(pc.equal(table.column("unit"), unit)).select(["pu_logit", "pu_probability"])
        logits, probability = (column.drop_null().to_numpy() for column in mine.columns)
        assert self.edges is not None
        counted: list[float] = count_scores(logits, probability, len(mine) - len(logits), self.edges).tolist()
        return counted


@dataclass
class ChunkLedger:
    """What came of a chunk so far."""

    files: list[tuple[str, int, int, str]] = field(default_factory=list)
    """(name, rows, bytes, first of its units) of each file of the attempt."""
    rows: Counter[str] = field(default_factory=Counter)
    """By unit."""
    reasons: Counter[str] = field(default_factory=Counter)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """By unit: what `count_scores` says of it, where it is asked."""
    spans: list[Span] = field(default_factory=list)

    def add(self, part: LedgerPart) -> int:
        """Enter what reached the driver; returns its rows."""
        self.spans += part.spans
        before = self.rows.total()
        for entry in part.entries:
            units, rejected = json.loads(entry["units"]), json.loads(entry["reasons"])
            self.files.append((entry["file"], sum(units.values()), entry["bytes"], next(iter(units))))
            self.rows.update(units)
            self.reasons.update(rejected)
            for unit, counted in json.loads(entry["scores"]).items():
                self.scores[unit] = self.scores.get(unit, 0) + np.array(counted)
            record("images_scored", sum(units.values()) - sum(rejected.values()))
            for reason, number in rejected.items():
                record("images_rejected", number, reason=reason)
        return self.rows.total() - before

    def groups(self, chunk: Sequence[Unit]) -> list[list[str]]:
        """The files in the order of the chunk's units, in groups that make one file of `scores/` each."""
        place = {unit.unit_id: i for i, unit in enumerate(chunk)}
        groups: list[list[str]] = []
        rows = size = 0
        for name, more_rows, more_bytes, _ in sorted(self.files, key=lambda file: place[file[3]]):
            if not groups or rows + more_rows > FILE_ROWS or size + more_bytes > FILE_BYTES:
                groups.append([])
                rows = size = 0
            groups[-1].append(name)
            rows, size = rows + more_rows, size + more_bytes
        return groups


@ray.remote(num_cpus=IO_CPUS)
def _merge(folder: RunFolder, chunk: str, files: list[str], rules: tuple[str, ...]) -> tuple[str, int]:
    """(name, rows) of the file of `scores/` that is made of some of an attempt."""
    name, schema, rows = f"scores/{chunk}-{uuid.uuid4().hex[:12]}.parquet", scores_schema(rules), 0

    def write(sink: Any) -> None:
        nonlocal rows
        rows, waiting = 0, schema.empty_table()
        with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
            for file in files:
                waiting = pa.concat_tables([waiting, folder.read_table(file)])
                if waiting.num_rows >= GROUP_ROWS or waiting.nbytes >= GROUP_BYTES:
                    writer.write_table(waiting)
                    rows, waiting = rows + waiting.num_rows, schema.empty_table()
            if waiting.num_rows:
                writer.write_table(waiting)
            rows += waiting.num_rows

    folder.write(name, write)
    return name, rows


def merge_attempt(
    folder: RunFolder, name: str, chunk: Sequence[Unit], ledger: ChunkLedger, rules: tuple[str, ...]
) -> list[str]:
    """Files of `scores/` with the rows of chunk `name`; RuntimeError unless they are those of the plan."""
    _check_conservation(chunk, ledger.rows)
    merged = ray.get([_merge.remote(folder, name, files, rules) for files in ledger.groups(chunk)])
    if (rows := sum(rows for _, rows in merged)) != ledger.rows.total():
        raise RuntimeError(
            f"{rows} of {ledger.rows.total()} rows of chunk {name} were merged. Nothing of it is kept; start again"
        )
    return [file for file, _ in merged]


def delete_unfinished(folder: RunFolder, markers: Sequence[dict[str, Any]]) -> None:
    """Delete what no manifest names.

    Not before this driver has committed all that is to do: until then one that was thought dead may still commit a
    chunk, files and all.
    """
    known = {file for marker in markers for file in marker["files"]}
    for file in folder.files("scores"):
        if file not in known:
            folder.delete(file)
    folder.delete_folder(ATTEMPTS)


def _check_conservation(chunk: Sequence[Unit], rows: Counter[str]) -> None:
    wrong = [(u, rows[u.unit_id]) for u in chunk if rows[u.unit_id] != u.rows]
    if wrong:
        unit, got = wrong[0]
        raise RuntimeError(
            f"{len(wrong)} units did not come through whole: {unit.files[0]} has {unit.rows} images by the plan, "
            f"{got} were scored. Nothing of this chunk is kept; start again"
        )
