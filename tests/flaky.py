"""Storage that fails when it is told to: the local disk by way of fsspec, as `flaky:///path`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import repeat
from typing import Any, ClassVar

from fsspec.implementations.local import LocalFileSystem


class Flaky(LocalFileSystem):
    """Each request (open, read) takes the next of `faults`: raises it; of a number, only so many bytes come."""

    protocol = ("flaky",)
    faults: ClassVar[Iterator[Exception | int | None]] = repeat(None)
    read: ClassVar[list[tuple[str, int, int]]] = []
    """(path, start, stop) of what was read."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(str(path).removeprefix("flaky://"))
        return stripped

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        _request()
        return _File(self._strip_protocol(path)) if mode == "rb" else super().open(path, mode, **options)


class _File(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        most = _request()
        start = self.tell()
        data = super().read(size if most is None else most) or b""
        Flaky.read.append((str(self.name), start, start + len(data)))
        return data


def _request() -> int | None:
    fault = next(Flaky.faults)
    if isinstance(fault, Exception):
        raise fault
    return fault
