"""A local disk that fails when it is told to, as `trouble:///path`: for the output of runs that are disturbed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

SWITCH = "PUKD_TROUBLE"
"""Variable with the path of a file: while there is one, every request fails with the error number in it."""

PROTOCOL = "trouble"
SITE = f"""import fsspec
fsspec.register_implementation("{PROTOCOL}", "{__name__}.Trouble")
"""
"""`sitecustomize.py` of all processes that are to know it: Ray's workers import nothing of ours before they read."""

_REQUESTS = ("created", "info", "ls", "makedirs", "mkdir", "mv", "open", "pipe_file", "rm", "rm_file", "rmdir")


class Trouble(LocalFileSystem):
    """Local files; what is open stays usable, every other request asks the switch."""

    protocol = (PROTOCOL,)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(str(path).removeprefix(f"{PROTOCOL}://"))
        return stripped


def _asking(name: str) -> Any:
    plain = getattr(LocalFileSystem, name)

    def request(self: Trouble, *arguments: Any, **options: Any) -> Any:
        switch = Path(os.environ[SWITCH])
        if switch.exists():
            raise OSError(int(switch.read_text()), "told to fail")
        return plain(self, *arguments, **options)

    return request


for _name in _REQUESTS:
    setattr(Trouble, _name, _asking(_name))
