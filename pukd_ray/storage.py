"""Paths and URIs -> (pyarrow filesystem, path): one way to reach local disks, object stores and fsspec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs


def is_local(uri: str) -> bool:
    """Whether `uri` is a path (or file://) on this machine."""
    return "://" not in uri or uri.startswith("file://")


def open_storage(uri: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem of `uri` and the path in it; schemes that pyarrow does not know go through fsspec.

    Raises ValueError naming the URI when no installed library serves its scheme.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{uri}: {error}") from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fs))
    return filesystem, path.rstrip("/")


def write_atomically(fs: pafs.FileSystem, path: str, write: Callable[[Any], None]) -> None:
    """Write `path` so that a reader sees all of it or nothing; `write` gets the open file.

    Object stores show an object only once it is closed; elsewhere a temporary name is renamed.
    """
    if fs.type_name == "s3" or fs.type_name == "gcs":
        with fs.open_output_stream(path) as sink:
            write(sink)
        return
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    temporary = f"{path}.tmp"
    with fs.open_output_stream(temporary) as sink:
        write(sink)
    fs.move(temporary, path)


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
    fs.delete_dir(source)
