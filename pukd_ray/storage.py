"""Paths and URIs -> (pyarrow filesystem, path): one way to reach local disks, object stores and fsspec."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

OBJECT_STORES = ("s3", "gcs", "abfs")


def is_local(uri: str) -> bool:
    """Whether `uri` is a path (or file://) on this machine."""
    return "://" not in uri or uri.startswith("file://")


def split_uri(uri: str) -> tuple[str, str, str]:
    """(scheme with `://`, path, `?key=value...`); a plain path has neither scheme nor query."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "", uri, ""
    path, query = rest, ""
    if scheme != "file" and (match := re.search(r"\?[\w.-]+=.*$", rest)):
        path, query = rest[: match.start()], match.group()
    return scheme + separator, path, query


def open_storage(uri: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem of `uri` and the path in it; schemes that pyarrow does not know go through fsspec.

    Raises ValueError naming the URI when no installed library serves its scheme.
    """
    if is_local(uri):
        return _LOCAL, str(Path(uri.removeprefix("file://")).expanduser().absolute())
    scheme, path, query = split_uri(uri)
    if scheme in ("s3://", "gs://", "gcs://"):
        # Only the bucket is parsed as a URI: keys may hold spaces, `%` and `#`, and stand for themselves.
        bucket, _, key = path.partition("/")
        filesystem, root = _open_bucket(f"{scheme}{bucket}{query}")
        return filesystem, f"{root}/{key}".rstrip("/")
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{uri}: {error}") from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fs))
    return filesystem, path.rstrip("/")


_LOCAL = pafs.LocalFileSystem()


@lru_cache(maxsize=64)
def _open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """One client per bucket and process: making one asks the network for the bucket's region."""
    opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
    return opened


def write_atomically(fs: pafs.FileSystem, path: str, write: Callable[[Any], None]) -> None:
    """Write `path` so that a reader sees all of it or nothing; `write` gets the open file.

    Object stores show an object once it is closed, be it whole or not: there the bytes are gathered first.
    Elsewhere a temporary file, of a name of its own, is renamed.
    """
    if fs.type_name in OBJECT_STORES:
        buffer = pa.BufferOutputStream()
        write(buffer)
        with fs.open_output_stream(path) as sink:
            sink.write(buffer.getvalue())
        return
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with fs.open_output_stream(temporary) as sink:
            write(sink)
        fs.move(temporary, path)
    except BaseException:
        with suppress(OSError):
            fs.delete_file(temporary)
        raise


def write_bytes(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write `data` atomically."""
    write_atomically(fs, path, lambda sink: sink.write(data))


def write_json(fs: pafs.FileSystem, path: str, value: Any) -> None:
    """Write `value` as readable JSON, atomically; NaN is refused."""
    write_bytes(fs, path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_bytes(fs: pafs.FileSystem, path: str) -> bytes:
    """All of the file."""
    with fs.open_input_stream(path, compression=None) as source:
        data: bytes = source.read()
    return data


def list_files(fs: pafs.FileSystem, folder: str, *, recursive: bool = True) -> list[pafs.FileInfo]:
    """Files below `folder`, sorted by path; none if it does not exist."""
    selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
    return sorted((f for f in fs.get_file_info(selector) if f.type == pafs.FileType.File), key=lambda f: f.path)


def move_tree(fs: pafs.FileSystem, source: str, target: str) -> None:
    """Rename a file or folder; file by file where the store has no folders to rename."""
    info = fs.get_file_info(source)
    if info.type == pafs.FileType.NotFound:
        return
    if info.type == pafs.FileType.File or fs.type_name == "local":
        fs.move(source, target)
        return
    for file in list_files(fs, source):
        moved = target + file.path[len(source) :]
        fs.create_dir(moved.rpartition("/")[0], recursive=True)
        fs.move(file.path, moved)
    if fs.get_file_info(source).type == pafs.FileType.Directory:
        fs.delete_dir(source)
