"""Files of a source: what is known of one, and ways to open it that more than one format needs."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pukd_ray.corpus.faults import BROKEN, one_line, reason_of
from pukd_ray.errors import MissingError
from pukd_ray.storage import is_local, open_file, open_storage, read_file, split_uri

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class SourceFile:
    """One file of a source; `relative` is its path relative to the source's `uri`."""

    uri: str
    relative: str
    size: int
    mtime: str


@dataclass(frozen=True)
class FileFacts:
    """What headers and footers say about one file."""

    parts: tuple[tuple[int, int], ...]
    """(rows, encoded bytes) of each row group; one part for other formats."""
    error: str | None = None
    """The file cannot be read at all: it counts as one row."""
    note: str | None = None
    """Something to tell the user, such as a tar that ends early."""

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(rows for rows, _ in self.parts)


def open_raw(uri: str) -> IO[bytes]:
    """A binary file, unzipped where its name ends in .gz."""
    handle: Any = open_file(uri)
    opened: IO[bytes] = gzip.open(handle) if split_uri(uri)[1].endswith(".gz") else handle  # type: ignore[assignment] # noqa: SIM115
    return opened


def read_whole(uri: str) -> tuple[bytes | None, str | None]:
    """(all bytes, None) of a small file, or (None, reason) of a link to nothing or a name that its storage cannot have.

    PlaceError if the storage fails or the file is gone.
    """
    try:
        return read_file(uri), None
    except MissingError:
        if is_local(uri) and Path(open_storage(uri)[1]).is_symlink():
            return None, "io: a link to nothing"
        raise
    except ValueError as error:  # such as a path with a NUL, or an S3 key with an empty part
        return None, reason_of(error) if is_local(uri) else f"io: {one_line(error)}"


def read_up_to(handle: IO[bytes], count: int) -> tuple[bytes, str | None]:
    """`count` bytes, or those before the file's end or a broken place, with the reason."""
    pieces = []
    try:
        while count > 0 and (piece := handle.read(min(count, _PIECE_BYTES))):
            pieces.append(piece)
            count -= len(piece)
    except BROKEN as error:
        return b"".join(pieces), reason_of(error)
    return b"".join(pieces), None
