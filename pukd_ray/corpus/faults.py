"""What goes wrong with a file, in the words of the `error` column."""

from __future__ import annotations

import lzma
import struct
import tarfile
import zlib

import pyarrow as pa


class UnpackingError(ValueError):
    """A compressed file unpacks to far more than its size accounts for."""


BROKEN = (
    *(pa.ArrowException, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(ValueError, LookupError, ArithmeticError, RecursionError, MemoryError),
)
"""What reading a damaged or hostile file raises, whatever its format. Storage that fails raises PlaceError: none of
these."""


def reason_of(error: BaseException) -> str:
    """`reason: detail` of one of `BROKEN`."""
    if isinstance(error, EOFError):
        reason = "truncated"
    elif isinstance(error, pa.ArrowNotImplementedError):
        reason = "unsupported"
    elif isinstance(error, UnpackingError | MemoryError):
        reason = "too_large"
    elif isinstance(error, OSError) and error.errno is not None:
        reason = "io"  # the system's; Arrow and gzip raise OSError for damaged content too, without a number
    else:
        reason = "corrupt"
    return f"{reason}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """First line of an exception's text, short and printable: it may quote the file."""
    line = (str(error).splitlines() or [""])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line) or type(error).__name__
