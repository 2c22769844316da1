"""What a run leaves on storage: schemas and markers. A run folder can live on any filesystem."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pukd_ray.config import ConfigError
from pukd_ray.errors import RunError
from pukd_ray.run.records import AttemptsRecord, RecordFile, StageMarker, T
from pukd_ray.run.stages import Stage
from pukd_ray.storage import (
    as_json,
    create_file,
    delete_file,
    is_local,
    list_files,
    move_tree,
    open_patiently,
    open_storage,
    patiently,
    read_bytes,
    split_uri,
    write_atomically,
    write_bytes,
)

LEASES = "markers/lease"
RETIRING = "markers/retiring.json"
"""What is being moved to `old/`, and where to."""

A = TypeVar("A")

SCORES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("content_hash", pa.int64()),
        pa.field("error", pa.string()),
        pa.field("pu_logit", pa.float32()),
        pa.field("pu_probability", pa.float32()),
        pa.field("teacher_label", pa.int32()),
        pa.field("teacher_confidence", pa.float32()),
        pa.field("teacher_entropy", pa.float32()),
        pa.field("relevant", pa.bool_()),
        pa.field("image", pa.binary()),
        pa.field("perceptual_hash", pa.binary(16)),
    ]
)


def scores_schema(rules: Sequence[str]) -> pa.Schema:
    """SCORES_SCHEMA and, at its end, a column for each of the rules that rank by one of their own."""
    return pa.schema([*SCORES_SCHEMA, *(pa.field(rule, pa.float32()) for rule in rules)])


SELECTED_SCHEMA = pa.schema(
    [
        SCORES_SCHEMA.field(name)
        for name in (
            "image_id",
            "source",
            "source_row",
            "pu_logit",
            "pu_probability",
            "teacher_label",
            "teacher_confidence",
            "image",
        )
    ]
)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder: relative names in, storage out."""

    uri: str
    token: int = 0
    """Of the lease under which its driver writes; 0: without one."""

    @property
    def display(self) -> str:
        """Absolute path or URI, for people."""
        return self.root if is_local(self.uri) else self.uri.rstrip("/")

    @cached_property
    def _storage(self) -> tuple[pafs.FileSystem, str]:
        return open_storage(self.uri)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "token": self.token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def fs(self) -> pafs.FileSystem:
        """Filesystem that holds the folder."""
        return self._storage[0]

    @property
    def root(self) -> str:
        """Path of the folder in `fs`."""
        return self._storage[1]

    def uri_of(self, name: str) -> str:
        """URI of `name`; a URI may have a query behind its path."""
        scheme, path, query = split_uri(self.uri)
        return f"{scheme}{path.rstrip('/')}/{name}{query}"

    def path(self, name: str) -> str:
        """Path of `name` in `fs`."""
        return f"{self.root}/{name}"

    def patiently(self, name: str, action: Callable[[], A]) -> A:
        """`action()` on `name`, as `storage.patiently` does."""
        return patiently(f"{self.display}/{name}", action)

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        info = self.patiently(name, lambda: self.fs.get_file_info(self.path(name)))
        return bool(info.type != pafs.FileType.NotFound)

    def files(self, name: str) -> list[str]:
        """Names of the files in folder `name` (not below), sorted."""
        found = self.patiently(name, lambda: list_files(self.fs, self.path(name), recursive=False))
        return [f"{name}/{f.base_name}" for f in found]

    def read_bytes(self, name: str) -> bytes:
        """All of a file; MissingError if there is none."""
        return self.patiently(name, lambda: read_bytes(self.fs, self.path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write atomically."""
        self.patiently(name, lambda: write_bytes(self.fs, self.path(name), data))

    def read_json(self, name: str) -> Any:
        """Parsed content, or None if there is no such file; RunError if it holds something else."""
        if not self.exists(name):
            return None
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise RunError(
                f"{self.display}/{name} is damaged, as after a power failure ({error}): delete it if it is below "
                "markers/, else make it anew by --redo of the stage that wrote it"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write atomically; NaN is refused."""
        self.write_bytes(name, as_json(value))

    def read_record(self, file: RecordFile[T]) -> T:
        """Content of a file whose fields are known; FileNotFoundError if the stage that writes it has not run."""
        record = self.find_record(file)
        if record is None:
            raise FileNotFoundError(
                f"{self.display}/{file.name} is not there: the stage that writes it is not done, run it first"
            )
        return record

    def find_record(self, file: RecordFile[T]) -> T | None:
        """The same, or None if it is not there."""
        found = (self.read_json(name) for name in (file.name, *file.older) if self.exists(name))
        record: T | None = next(found, None)
        return record

    def write_record(self, file: RecordFile[T], record: T) -> None:
        """Write it atomically."""
        self.write_json(file.name, record)

    def write_text(self, name: str, text: str) -> None:
        """Write atomically."""
        self.write_bytes(name, text.encode())

    def open(self, name: str) -> Any:
        """A file to read at any place, patiently."""
        return open_patiently(f"{self.display}/{name}", lambda: self.fs.open_input_file(self.path(name)))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet file."""
        with self.open(name) as source:
            return pq.read_table(source, columns=columns)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one Parquet file atomically."""
        self.write(name, lambda sink: pq.write_table(table, sink, **parquet_options(table.schema)))

    def write(self, name: str, write: Callable[[Any], None]) -> None:
        """Write what `write` puts into the open file that it is given, atomically; on trouble it is called again."""
        self.patiently(name, lambda: write_atomically(self.fs, self.path(name), write))

    def delete(self, name: str) -> None:
        """Delete one file."""
        self.patiently(name, lambda: delete_file(self.fs, self.path(name)))

    def delete_folder(self, name: str) -> None:
        """Delete a folder if it is there."""
        if self.exists(name):
            self.patiently(name, lambda: self.fs.delete_dir(self.path(name)))

    # -- one writer -----------------------------------------------------------------------------------------

    def last_token(self) -> int:
        """Of the newest lease; 0 if there never was one."""
        return max((int(name.rpartition("/")[2].removesuffix(".json")) for name in self._leases()), default=0)

    def _leases(self) -> list[str]:
        return [name for name in self.files(LEASES) if name.endswith(".json")]

    def lease_is_lost(self) -> bool:
        """Whether another driver has taken over since the lease of this one was taken."""
        return bool(self.token) and self.last_token() != self.token

    def check_lease(self) -> None:
        """RunError if another driver has taken over."""
        if self.lease_is_lost():
            other = self.read_json(f"{LEASES}/{self.last_token():08d}.json") or {"pid": "?", "host": "?"}
            raise RunError(
                f"output: {self.display} was taken over by process {other['pid']} on {other['host']}, as nothing had "
                "been heard of this one for a while: it goes on there; what this one had not committed is not used"
            )

    def create_json(self, name: str, value: Any) -> bool:
        """Write a file unless it is there; whether it was this call that wrote it."""
        return self.patiently(name, lambda: create_file(self.fs, self.path(name), self.uri_of(name), as_json(value)))

    def commit_json(self, name: str, value: Any) -> None:
        """Write a file that nobody may have written yet; RunError if another driver has, or has taken over."""
        self.check_lease()
        if not self.create_json(name, value):
            raise RunError(
                f"{self.display}/{name}: another driver has written it: see that one alone is at work in this folder, "
                "and run the same command again to go on where they stopped"
            )

    # -- stages ---------------------------------------------------------------------------------------------

    def marker(self, stage: str) -> StageMarker | None:
        """What a finished stage recorded; None if it is not finished."""
        marker: StageMarker | None = self.read_json(f"markers/{stage}.json")
        return marker

    def finish(self, stage: str, inputs: dict[str, Any], seconds: float, counts: dict[str, Any]) -> None:
        """Commit a stage; everything it wrote is on storage by now."""
        self.record_attempt(stage, seconds)
        marker: StageMarker = {
            "stage": stage,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.spent(stage),
            "counts": counts,
            "inputs": inputs,
        }
        self.check_lease()  # again: storage may have been slow
        self.write_json(f"markers/{stage}.json", marker)

    def spent(self, stage: str) -> float:
        """Seconds of all attempts at a stage, failed or not, since it was last retired."""
        attempts = self.attempts(stage)
        return attempts["seconds"] if attempts else 0.0

    def attempts(self, stage: str) -> AttemptsRecord | None:
        """At the stage, since it was last retired; None before the first has ended."""
        attempts: AttemptsRecord | None = self.read_json(f"markers/{stage}.attempts.json")
        return attempts

    def record_attempt(self, stage: str, seconds: float, error: str | None = None) -> None:
        """Remember the time of an attempt, and why it failed if it did; RunError if another driver has taken over."""
        self.check_lease()
        record: AttemptsRecord = {
            "seconds": round(self.spent(stage) + seconds, 3),
            "error": error,
            "failed": error and datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.write_json(f"markers/{stage}.attempts.json", record)

    def has_outputs(self, stage: Stage) -> bool:
        """Whether the stage left anything, finished or not."""
        return any(self.exists(name) for name in stage.outputs)

    def retire(self, stages: Sequence[Stage]) -> str:
        """Rename what `stages` left to `old/<time>/`; returns that name."""
        # Markers go first, the last stage's before the others': what is left by a crash is not taken for done.
        names = [
            f"markers/{stage.name}{suffix}" for stage in reversed(stages) for suffix in (".json", ".attempts.json", "")
        ]
        names += [name for stage in stages for name in stage.outputs]
        # What a stage began with goes last: what it left half done must not be taken for that of other settings.
        names += [f"markers/{stage.name}.inputs.json" for stage in stages]
        self.write_json(RETIRING, {"names": names, "to": self._old()})
        return self.retire_on()

    def retire_on(self) -> str:
        """Go on with what `retire` began; a run whose driver died in between has to, before it looks at its stages."""
        left = self.read_json(RETIRING)
        self._set_aside(left["names"], left["to"])
        self.delete(RETIRING)
        return str(left["to"])

    def set_aside(self, names: Sequence[str]) -> str:
        """Rename those of the files and folders `names` that are there, in this order, to `old/<time>/`; that name."""
        old = self._old()
        self._set_aside(names, old)
        return old

    def _old(self) -> str:
        now = time.strftime("%Y%m%d-%H%M%S")
        return next(n for i in count(1) if not self.exists(n := f"old/{now}" + (f"-{i}" if i > 1 else "")))

    def _set_aside(self, names: Sequence[str], old: str) -> None:
        for name in names:
            if self.exists(name):
                self.patiently(name, partial(self._move, name, f"{old}/{name}"))

    def _move(self, name: str, target: str) -> None:
        self.fs.create_dir(self.path(target).rpartition("/")[0], recursive=True)
        move_tree(self.fs, self.path(name), self.path(target))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Of pyarrow's writers: to compress encoded images, or look for equal ones, is work for nothing."""
    columns = [name for name in schema.names if name != "image"]
    if len(columns) == len(schema.names):
        return {"compression": "zstd"}
    return {"compression": {**dict.fromkeys(columns, "zstd"), "image": "none"}, "use_dictionary": columns}


def absolute(output: str) -> str:
    """`output` as URI or absolute path."""
    return output if not is_local(output) else str(Path(output.removeprefix("file://")).expanduser().absolute())


def open_run(output: str) -> RunFolder:
    """The folder of a run, for those who only read it; ConfigError if no storage is known by such a name."""
    try:
        open_storage(output)
    except ValueError as error:
        raise ConfigError([f"arguments: {error}"]) from error
    return RunFolder(absolute(output))


def changed_inputs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys whose values differ, sorted. A key of a source that is null is as if it were not there: later versions have
    more of them."""
    return sorted(key for key in old.keys() | new.keys() if _told(old.get(key)) != _told(new.get(key)))


def _told(value: Any) -> Any:
    if isinstance(value, list):
        return [_told(item) for item in value]
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
