"""Listing and planning a corpus of single files that exists by name only; prints one line of JSON.

python -m benchmarks.meter python -m benchmarks.listing --files 10000000

Peaks are of the driver's own memory. The temporary tables are files that it maps: what the system keeps of them in
memory, it drops where others need it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.listing import Drift, compare_listing, list_inputs, read_files
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.stored_units import read_units
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import engine

PER_FOLDER = 10_000


class ByName(AbstractFileSystem):
    """`byname:///lake/<folder>/<file>.jpg`: `files` of them, about 100 kB each."""

    protocol = ("byname",)
    files: ClassVar[int] = 0

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """Of the lake its folders, of a folder its files."""
        del options
        parts = self._strip_protocol(path).strip("/").split("/")
        if len(parts) == 1:
            names = [f"/lake/{folder:06d}" for folder in range(-(-self.files // PER_FOLDER))]
            found = [{"name": name, "size": 0, "type": "directory"} for name in names]
        else:
            first = int(parts[1]) * PER_FOLDER
            found = [
                {"name": f"/lake/{parts[1]}/photo-{n:012d}.jpg", "size": 100_000, "type": "file", "mtime": 1.7e9}
                for n in range(first, min(first + PER_FOLDER, self.files))
            ]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Nobody asks for that of a file."""
        del options
        return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}


def own_memory() -> float:
    """Of this process, without what it maps, MiB."""
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


class Peak:
    """Greatest `own_memory` so far, looked at twenty times a second."""

    def __init__(self) -> None:
        self.mib = own_memory()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.mib = max(self.mib, own_memory())
            time.sleep(0.05)


def main() -> None:
    """List, plan, open the plan, list again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    ByName.files = parser.parse_args().files
    fsspec.register_implementation("byname", ByName)
    sources: dict[str, tuple[SourceConfig, ...]] = {"corpus": (SourceConfig(uri="byname:///lake"),)}
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = round(time.time() - began, 1)

    with tempfile.TemporaryDirectory() as place, engine("listing"):
        folder, start, peak = RunFolder(place), own_memory(), Peak()
        began = time.time()
        listing = list_inputs(sources).table
        timed("list", began)
        plan_inputs(folder, sources, listing, print)
        timed("list and plan", began)
        units = read_units(folder)
        timed("until the first unit can be read", began)
        assert sum(unit.rows for unit in units) == ByName.files
        began = time.time()
        drift = compare_listing(read_files(folder), list_inputs(sources).table)
        timed("list and compare", began)
        assert drift == Drift(0, ())
        sizes = {
            name: round((Path(place) / name).stat().st_size / 2**20, 1) for name in ("plan.parquet", "files.parquet")
        }
    found = {"files": ByName.files, "units": len(units), "seconds": seconds, "MiB on disk": sizes}
    print(json.dumps(found | {"MiB before": round(start), "peak MiB": round(peak.mib)}))


if __name__ == "__main__":
    main()
