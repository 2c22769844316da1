"""What goes wrong with a file, in the words of the `error` column."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib

import pyarrow as pa

# What reading a damaged or unreachable file raises, whatever its format.
BROKEN = (pa.ArrowException, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)

_SAYS_CORRUPT = re.compile(r"corrupt|decompress|deserializ|thrift|gzip|crc|unexpected end of stream", re.IGNORECASE)


def reason_of(error: BaseException) -> str:
    """`reason: detail` of one of `BROKEN`."""
    if isinstance(error, EOFError):
        reason = "truncated"
    elif isinstance(error, TimeoutError):
        reason = "timeout"
    elif isinstance(error, pa.ArrowNotImplementedError):
        reason = "unsupported"
    elif isinstance(error, OSError) and not _SAYS_CORRUPT.search(str(error)):
        reason = "io"  # Arrow raises OSError for damaged pages too
    else:
        reason = "corrupt"
    return f"{reason}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """First line of an exception's text, short enough for a table."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
