"""Paths and URIs -> (pyarrow filesystem, path): one way to reach local disks, object stores and fsspec."""

from __future__ import annotations

import errno
import io
import json
import random
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from pukd_ray.errors import MissingError, PlaceError

OBJECT_STORES = ("s3", "gcs", "abfs")

# A store that is overloaded, or a network that drops out, is back within a minute; what is not needs a person.
PATIENCE_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
MOVES_AT_A_TIME = 16
SETTLE_SECONDS = 2.0
"""After which the last of several writers is known, where storage cannot refuse all but the first."""

# Faults of the program, or of what it was given, are nobody's storage: they are raised as they are.
_PROGRAM = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Faults of storage that asking again does not mend: by type, and where pyarrow has none for them (S3, Azure) by its
# words. `[code ...]` are those that only S3 knows, such as an archived object.
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_FILE_EITHER = (errno.ENAMETOOLONG, errno.ELOOP)
_SAYS_MISSING = re.compile(
    r"AWS Error (NO_SUCH_\w+|RESOURCE_NOT_FOUND|UNKNOWN \(HTTP status 4(04|10)\))|Azure Error: \[\w*\] 404\b"
    r"|^Cannot open for reading: path '.*' is a directory"
)
_SAYS_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|\[code \d+\]|UNKNOWN \(HTTP status 403\))|Azure Error: \[\w*\] 403\b"
)

T = TypeVar("T")


def is_local(uri: str) -> bool:
    """Whether `uri` is a path (or file://) on this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The absolute path of a local URI; `%20` in file:// is a space, unless there is a file of that very name."""
    path = Path(uri.removeprefix("file://")).expanduser().absolute()
    decoded = Path(unquote(str(path)))
    return decoded if uri.startswith("file://") and not path.exists() and decoded.exists() else path


def split_uri(uri: str) -> tuple[str, str, str]:
    """(scheme with `://`, path, `?key=value...`); a plain path has neither scheme nor query."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "", uri, ""
    path, query = rest, ""
    if scheme != "file" and (match := re.search(r"\?[\w.-]+=.*$", rest)):
        path, query = rest[: match.start()], match.group()
    return scheme + separator, path, query


# `KEY:SECRET@` before the bucket; `host:port` is none.
_PASSWORD = re.compile(r"(://)[^/\s@:]*:(?!\d+(?:/|\Z))[^\s@]*@")
_SECRET = re.compile(
    r"([?&](?:[\w.-]*(?:secret|token|passw|signature|credential|access.?key|account.?key|api.?key)[\w.-]*|sig)=)[^&\s]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with passwords and signatures in its URIs made illegible; as it is if there are none."""
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def open_storage(uri: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem of `uri` and the path in it; schemes that pyarrow does not know go through fsspec.

    Raises ValueError naming the URI when no installed library serves its scheme.
    """
    if is_local(uri):
        return _LOCAL, str(local_path(uri))
    uri = re.sub("^s3[an]://", "s3://", uri)  # Hadoop's names of it
    scheme, path, query = split_uri(uri)
    if scheme in ("s3://", "gs://", "gcs://"):
        # Only the bucket is parsed as a URI: keys may hold spaces, `%` and `#`, and stand for themselves.
        bucket, _, key = path.partition("/")
        filesystem, root = _open_bucket(f"{scheme}{bucket}{query}")
        return filesystem, f"{root}/{key}".rstrip("/")
    try:
        if scheme == "hf://":  # pyarrow would wrap it itself, in a handler that takes every fault for a file not there
            raise pa.ArrowNotImplementedError
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"{uri}: {error}; name a path or a scheme that an installed library serves, such as s3://"
            ) from error
        filesystem = pafs.PyFileSystem(_Fsspec(fs))
    return filesystem, path.rstrip("/")


_LOCAL = pafs.LocalFileSystem()


class _Fsspec(pafs.FSSpecHandler):
    """Opens at once: pyarrow's own asks first, and takes whatever goes wrong then for a file that is not there."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_stream = open_input_file


@lru_cache(maxsize=64)
def _open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """One client per bucket and process: making one asks the network for the bucket's region."""
    opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
    return opened


def patiently(where: str, action: Callable[[], T]) -> T:
    """`action()` on the file or folder `where`; where storage fails in passing, again for about a minute.

    Then, and at once if the fault is one that lasts, PlaceError (MissingError: not there). What the program itself does
    wrong is raised as it is. The one policy for all that is read and written, on local disks too.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except _PROGRAM:
            raise
        except Exception as error:
            fault: BaseException = error
            if where.startswith("http") and isinstance(error, FileNotFoundError):
                fault = error.__cause__ or error  # fsspec calls every page that it cannot open "not found"
            lasting = _lasting(where, fault)
            if lasting:
                raise lasting from error
            if time.monotonic() + pause - began > PATIENCE_SECONDS:
                raise PlaceError(
                    f"{where}: the storage does not answer ({_in_short(fault)}): see that it does, and {_GO_ON}"
                ) from error
        time.sleep(pause * random.uniform(0.5, 1.5))  # the readers of a busy store must not come back all at once
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


_GO_ON = "run the same command again to go on where this stopped"


def _lasting(where: str, fault: BaseException) -> PlaceError | None:
    """What to raise of a fault that asking again does not mend; None of others."""
    text, status = str(fault), getattr(fault, "status", None)  # of HTTP clients
    number = getattr(fault, "errno", None)
    if isinstance(fault, _NO_FILE) or number in _NO_FILE_EITHER or status in (404, 410) or _SAYS_MISSING.search(text):
        return MissingError(f"{where}: is not there ({_in_short(fault)}): bring it back, and {_GO_ON}")
    if isinstance(fault, PermissionError) or status == 403 or _SAYS_REFUSED.search(text):
        return PlaceError(
            f"{where}: the storage refuses it ({_in_short(fault)}): give this machine's account access, and {_GO_ON}"
        )
    return None


def _in_short(fault: BaseException) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:300]


def read_file(uri: str) -> bytes:
    """All of a file, patiently."""
    return patiently(uri, lambda: read_bytes(*open_storage(uri)))


def open_file(uri: str) -> Any:
    """A binary file to read at any place, patiently: PlaceError if its storage fails."""

    def opened() -> pa.NativeFile:
        fs, path = open_storage(uri)
        return fs.open_input_file(path)

    return open_patiently(uri, opened)


def open_patiently(where: str, opened: Callable[[], pa.NativeFile]) -> Any:
    """The same of what `opened()` opens, for messages about `where`."""
    return _PatientFile(where, opened)


class SizedReader(io.RawIOBase):
    """A file of `_size` bytes that is read from `_position` on; whoever inherits sets the size and reads."""

    _size: int
    _position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """The new position; as of any file."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def _count(self, size: int | None) -> int:
        """Bytes that a `read` of `size` brings."""
        rest = max(0, self._size - self._position)
        return rest if size is None or size < 0 else min(size, rest)


class _PatientFile(SizedReader):
    """A read that fails is done again where it was, on the file opened anew: whoever reads does not notice."""

    def __init__(self, where: str, opened: Callable[[], pa.NativeFile]) -> None:
        super().__init__()
        self._where, self._open = where, opened
        self._opened: pa.NativeFile | None = None
        self._size = self._ask(lambda file: int(file.size()))

    def _ask(self, question: Callable[[pa.NativeFile], T]) -> T:
        def once() -> T:
            file, self._opened = self._opened, None
            if file is None:
                file = self._open()
            answer = question(file)
            self._opened = file  # one that failed is not used again
            return answer

        return patiently(self._where, once)

    def read(self, size: int | None = -1, /) -> bytes:
        count = self._count(size)
        data = self._ask(partial(_read_at, count, self._position)) if count else b""
        self._position += count
        return data

    def close(self) -> None:
        self._opened = None
        super().close()


def _read_at(count: int, position: int, file: pa.NativeFile) -> bytes:
    data: bytes = file.read_at(count, position)
    if len(data) < count:
        raise ConnectionError(f"{len(data)} of {count} bytes came")
    return data


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


def create_file(fs: pafs.FileSystem, path: str, uri: str, data: bytes) -> bool:
    """Write a file unless there is one; whether this call wrote it.

    Of several writers at once one wins where storage can tell: local disks, S3 if boto3 is installed, and what fsspec
    creates so. Elsewhere the last one does, as it finds out a moment later; one that is held up between looking and
    writing for longer than that may overwrite it.
    """
    if fs.type_name == "local":
        return _create_locally(Path(path), data)
    if fs.type_name == "s3" and (client := _s3_client(uri)):
        bucket, _, key = path.partition("/")
        return _created(path, data, fs, lambda: client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))
    if isinstance(fs, pafs.PyFileSystem):
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        return _created(path, data, fs, lambda: fs.handler.fs.pipe_file(path, data, mode="create"))
    if fs.get_file_info(path).type != pafs.FileType.NotFound:
        return bool(read_bytes(fs, path) == data)
    write_bytes(fs, path, data)
    time.sleep(SETTLE_SECONDS)
    return bool(read_bytes(fs, path) == data)


def _create_locally(path: Path, data: bytes) -> bool:
    """Whole or not at all: by a second name for a file that is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return path.read_bytes() == data
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            try:  # a file system without second names
                with path.open("xb") as sink:
                    sink.write(data)
            except FileExistsError:
                time.sleep(SETTLE_SECONDS / 10)  # it may be being written
                return path.read_bytes() == data
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: str, data: bytes, fs: pafs.FileSystem, create: Callable[[], object]) -> bool:
    try:
        create()
    except Exception as error:
        response: dict[str, Any] = getattr(error, "response", {})
        code = response.get("Error", {}).get("Code")
        if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
            return bool(read_bytes(fs, path) == data)  # what was heard, but not answered, is ours
        if code in ("403", "AccessDenied"):
            raise PermissionError(str(error)) from error
        raise
    return True


@lru_cache(maxsize=8)
def _s3_client(uri: str) -> Any:
    """boto3's, which knows conditional writes, set up as pyarrow would be by the same URI; None if it is not there."""
    try:
        import boto3
    except ImportError:
        return None
    options = dict(parse_qsl(split_uri(uri)[2].removeprefix("?")))
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    return boto3.client("s3", region_name=options.get("region"), endpoint_url=endpoint)


def write_bytes(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write `data` atomically."""
    write_atomically(fs, path, lambda sink: sink.write(data))


def as_json(value: Any) -> bytes:
    """Readable JSON; ValueError for NaN."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_bytes(fs: pafs.FileSystem, path: str) -> bytes:
    """All of the file."""
    with fs.open_input_stream(path, compression=None) as source:
        data: bytes = source.read()
    return data


def delete_file(fs: pafs.FileSystem, path: str) -> None:
    """Delete a file; one that is gone is fine: an earlier try may have been heard though it was not answered."""
    with suppress(FileNotFoundError):
        fs.delete_file(path)


def list_files(fs: pafs.FileSystem, folder: str, *, recursive: bool = True) -> list[pafs.FileInfo]:
    """Files below `folder`, sorted by path; none if it does not exist."""
    selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
    return sorted((f for f in fs.get_file_info(selector) if f.type == pafs.FileType.File), key=lambda f: f.path)


def move_tree(fs: pafs.FileSystem, source: str, target: str) -> None:
    """Rename a file or folder; where the store has no folders to rename, its files, some at a time."""
    info = fs.get_file_info(source)
    if info.type == pafs.FileType.NotFound:
        return
    if info.type == pafs.FileType.File or fs.type_name == "local":
        fs.move(source, target)
        return

    def move(file: pafs.FileInfo) -> None:
        moved = target + file.path[len(source) :]
        fs.create_dir(moved.rpartition("/")[0], recursive=True)
        fs.move(file.path, moved)

    with ThreadPoolExecutor(MOVES_AT_A_TIME) as pool:
        list(pool.map(move, list_files(fs, source)))
    if fs.get_file_info(source).type == pafs.FileType.Directory:
        fs.delete_dir(source)
