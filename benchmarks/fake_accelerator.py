"""An accelerator that is none: its batches take time, and no work. No config can name it: only benchmarks use it.

Apart from the benchmark, so that the processes of its actors import neither that nor torch.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pyarrow as pa

from pukd_ray.corpus.streaming import TimedActor
from pukd_ray.run.folder import scores_schema


class FakeAccelerator(TimedActor):
    """Stands for the networks of the score stage: sleeps `seconds` per batch, one batch at a time as a card would."""

    def __init__(self, seconds: float, folder: str) -> None:
        """When each batch began and ended goes to a file of this process in `folder`."""
        self._seconds = seconds
        self._log = Path(folder) / f"{os.getpid()}.txt"
        self._card = threading.Lock()

    def work(self, table: pa.Table) -> pa.Table:
        """The same rows as `ScoreImages` leaves them, without scores."""
        with self._card:
            began = time.time()
            time.sleep(self._seconds)
            ended = time.time()
        with self._log.open("a") as log:
            log.write(f"{began} {ended}\n")
        schema = scores_schema([])
        for name in set(schema.names) - set(table.column_names):
            table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
        image = pa.nulls(table.num_rows, pa.binary())
        table = table.set_column(table.schema.get_field_index("image"), "image", image)
        return table.select([*schema.names, "unit"])


def read_log(folder: Path) -> list[list[tuple[float, float]]]:
    """(began, ended) of the batches of each accelerator, in order."""
    files = sorted(folder.glob("*.txt"))
    return [[(float(b), float(e)) for b, e in map(str.split, file.read_text().splitlines())] for file in files]
