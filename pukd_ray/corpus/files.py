"""Files of a source: what is known of one, and ways to open it that more than one format needs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import numpy as np

from pukd_ray.corpus.faults import BROKEN, UnpackingError, one_line, reason_of
from pukd_ray.errors import MissingError
from pukd_ray.storage import SizedReader, is_local, open_file, open_storage, patiently, read_file, split_uri

BLOCK_BYTES = 8 << 20
"""What one request to remote storage asks for, where more than that is wanted in a row."""
IMAGE_BYTES = 128 << 20
"""Longest encoded image that is read."""
UNPACKED_BYTES = 1 << 30
UNPACKED_TIMES = 100
"""A compressed file may unpack to `UNPACKED_BYTES`, or to `UNPACKED_TIMES` its size if that is more."""
READ_TIMES = 3
"""Most bytes that are read for one that is wanted, in order to ask once for what lies close together."""

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
    """(rows, encoded bytes) of each row group, or of each run of rows that becomes a unit; else one part."""
    error: str | None = None
    """The file cannot be read at all: it counts as one row."""
    note: str | None = None
    """Something to tell the user, such as a tar that ends early."""
    indices: tuple[bytes, ...] = field(default=(), compare=False)
    """Where the rows of each part are (`Spans.pack`), if the format has no index of its own."""
    repeated: tuple[int, ...] = field(default=(), compare=False)
    """Rows whose name an earlier row of the file has."""

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(rows for rows, _ in self.parts)


@dataclass(frozen=True)
class Spans:
    """Pieces of a file, in order, each with some rows: made once, while the file is counted."""

    starts: np.ndarray
    """First byte of each, int64 [n]."""
    stops: np.ndarray
    """Byte after its last, int64 [n]."""
    rows: np.ndarray
    """How many rows it has, int64 [n], at least one each."""

    def pack(self) -> bytes:
        """One to three bytes a piece, as a rule."""
        gaps = self.starts - np.r_[0, self.stops[:-1]]
        return zlib.compress(np.stack([gaps, self.stops - self.starts, self.rows]).astype("<i8").tobytes(), 6)

    @classmethod
    def unpack(cls, packed: bytes) -> Spans:
        """Inverse of `pack`."""
        gaps, lengths, rows = np.frombuffer(zlib.decompress(packed), "<i8").reshape(3, -1)
        stops = np.cumsum(gaps + lengths)
        return cls(stops - lengths, stops, rows)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Regular expression of a glob in which `*` stays within a folder and `**` crosses them."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]/][^]/]*\])", glob):
        if re.fullmatch(r"\[.+\]", piece):
            expression += piece.replace("\\", r"\\").replace("[!", "[^", 1)
        else:
            expression += forms.get(piece) or re.escape(piece)
    return re.compile(expression)


def is_packed(uri: str) -> bool:
    """Whether a file's name says that it is gzip'd."""
    return split_uri(uri)[1].lower().endswith(".gz")


def open_raw(uri: str, *, whole: bool = True) -> IO[bytes]:
    """A binary file to be read from its start, unzipped where its name ends in .gz; `whole`: as for `open_blocks`."""
    handle = open_blocks(uri, whole=whole)
    return unpacked(handle) if is_packed(uri) else handle


def open_blocks(
    uri: str,
    starts: Sequence[int] | np.ndarray = (),
    stops: Sequence[int] | np.ndarray = (),
    *,
    whole: bool = True,
) -> IO[bytes]:
    """A binary file; on remote storage one that is asked for megabytes at a time, however small the reads.

    If only bytes [start, stop) of some places are wanted, in rising order, what is read is at most `READ_TIMES` that;
    if it is read on from its start, but not to its end (not `whole`), at most a quarter more, or 64 KiB.
    """
    handle: IO[bytes] = open_file(uri)
    if is_local(uri):
        return handle
    blocks: Any = _Blocks(handle, *_joined(np.asarray(starts), np.asarray(stops)), whole)
    opened: IO[bytes] = blocks
    return opened


def _joined(starts: np.ndarray, stops: np.ndarray) -> tuple[list[int], list[int]]:
    """The same places, with those joined that are cheaper to read at once."""
    firsts: list[int] = []
    lasts: list[int] = []
    wanted = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        length = stop - start
        if firsts and stop - firsts[-1] <= min(READ_TIMES * (wanted + length), BLOCK_BYTES):
            lasts[-1], wanted = stop, wanted + length
        elif firsts and start <= lasts[-1]:
            lasts[-1], wanted = max(stop, lasts[-1]), wanted + length
        else:
            firsts.append(start)
            lasts.append(stop)
            wanted = length
    return firsts, lasts


class _Blocks(SizedReader):
    """A file read in blocks: up to `BLOCK_BYTES`, but not beyond the end of the place that is wanted."""

    def __init__(self, handle: IO[bytes], starts: list[int], stops: list[int], whole: bool) -> None:
        super().__init__()
        self._handle, self._starts, self._stops, self._whole = handle, np.array(starts), np.array(stops), whole
        self._size = handle.seek(0, io.SEEK_END)
        self._block_at = 0
        self._block = b""

    def read(self, size: int | None = -1, /) -> bytes:
        count = self._count(size)
        inner = self._position - self._block_at
        here = self._block[inner : inner + count] if 0 <= inner < len(self._block) else b""
        if len(here) < count:
            at = self._position + len(here)
            more = self._load(at, count - len(here))
            here = here + more[: count - len(here)] if here else more[:count]
        self._position += len(here)
        return here

    def _load(self, at: int, count: int) -> bytes:
        """At least `count` bytes, and those that will be wanted next; one request."""
        stop = at + (BLOCK_BYTES if self._whole else min(BLOCK_BYTES, max(64 << 10, at // 4)))
        if len(self._starts):
            place = int(np.searchsorted(self._starts, at, "right")) - 1
            stop = min(stop, int(self._stops[place])) if place >= 0 else at
        self._handle.seek(at)
        data = self._handle.read(min(max(stop, at + count), self._size) - at)
        self._block_at, self._block = at, data
        return data

    def close(self) -> None:
        self._handle.close()
        super().close()


_PACKED: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))


def unpacked(handle: IO[bytes]) -> IO[bytes]:
    """`handle` from its start, unpacked if its first bytes are those of gzip, bzip2 or xz.

    Reading raises UnpackingError where it goes too far.
    """
    size = handle.seek(0, io.SEEK_END)
    handle.seek(0)
    head = handle.read(6)
    handle.seek(0)
    for magic, opened in _PACKED:
        if head.startswith(magic):
            return _Unpacked(opened(handle), max(UNPACKED_BYTES, UNPACKED_TIMES * size))  # type: ignore[return-value]
    return handle


class _Unpacked(io.RawIOBase):
    """Ends a file that unpacks without end."""

    def __init__(self, handle: IO[bytes], most: int) -> None:
        super().__init__()
        self._handle, self._most = handle, most

    def _left(self, place: int) -> int:
        """Bytes that may come behind `place`; UnpackingError if some do behind the last."""
        if place > self._most or (place == self._most and self._handle.read(1)):
            raise UnpackingError(f"it unpacks to more than {self._most:,} bytes")
        return max(self._most - place, 1)

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._left(self._handle.tell())
        return self._handle.read(left if size is None or size < 0 else min(size, left))

    def read1(self, size: int = -1, /) -> bytes:
        """What comes without waiting for more, as of a file that breaks off."""
        left = self._left(self._handle.tell())
        data: bytes = self._handle.read1(left if size < 0 else min(size, left))  # type: ignore[attr-defined]
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_SET and offset > self._most:
            self._left(offset)
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._handle.close()
        super().close()


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


def leads_out(path: str, folder: str) -> str:
    """Where a local path leads, by links, that is not in `folder`, a path without any; empty if it stays there."""
    target = os.path.realpath(path)
    inside = Path(target).is_relative_to(folder) or not os.path.lexists(target)
    return "" if inside else target


def read_beside(uri: str, path: str, follow_links: bool) -> tuple[bytes | None, str | None]:
    """(all bytes, None), or (None, reason), of an image at `path` that the file `uri` names."""
    try:
        if (file := beside(uri, path)) is None:
            return None, f"unsupported: not a path in the folder of the file: {path!r}"[:200]
        fs, place = open_storage(file)
        if is_local(uri) and not follow_links and leads_out(place, os.path.realpath(Path(open_storage(uri)[1]).parent)):
            return None, f"unsupported: a link that leads out of the folder of the file: {path!r}"[:200]
        size = patiently(file, lambda: fs.get_file_info(place)).size or 0
        if size > IMAGE_BYTES:
            return None, f"too_large: {size:,} bytes, more than {IMAGE_BYTES >> 20} MiB"
        return read_whole(file)
    except MissingError:  # the plan knows nothing of this file: it is the line that is wrong
        return None, f"io: there is no file {path!r}"[:200]
    except ValueError as error:  # such as a path with a NUL
        return None, reason_of(error)


def beside(uri: str, path: str) -> str | None:
    """Where the image at `path` is that the file `uri` names; None outside of its folder."""
    scheme, own, query = split_uri(uri)
    folder = own.rpartition("/")[0] + "/"
    named, place, more = split_uri(path)
    if named:
        same = named == scheme or (is_local(path) and is_local(uri))
        if not same or more not in ("", query):
            return None
    else:
        place = path if path.startswith("/") and is_local(uri) else folder + path
    inside = place.startswith(folder) and ".." not in unquote(place).split("/")
    found = f"{scheme}{place}{query}"
    # A path must not bring options of the storage with it, such as another host.
    return found if inside and split_uri(found) == (scheme, place, query) else None


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
