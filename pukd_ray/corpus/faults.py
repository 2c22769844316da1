"""What goes wrong with a file, in the words of the `error` column."""

from __future__ import annotations

import lzma
import tarfile
import zlib

import pyarrow as pa

# What reading a damaged file raises, whatever its format. Storage that fails raises PlaceError, which is none of these.
BROKEN = (pa.ArrowException, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)


def reason_of(error: BaseException) -> str:
    """`reason: detail` of one of `BROKEN`."""
    if isinstance(error, EOFError):
        reason = "truncated"
    elif isinstance(error, pa.ArrowNotImplementedError):
        reason = "unsupported"
    elif isinstance(error, OSError) and error.errno is not None:
        reason = "io"  # the system's; Arrow and gzip raise OSError for damaged content too, without a number
    else:
        reason = "corrupt"
    return f"{reason}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """First line of an exception's text, short enough for a table."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
