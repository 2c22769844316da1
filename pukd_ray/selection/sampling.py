"""Which corpus images training sees: a stratified sample over many units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pukd_ray.corpus.reading import ReadRequest, content_hash
from pukd_ray.corpus.units import Unit

MIN_PER_UNIT = 64  # opening a unit costs more than reading a few dozen rows of it


def sample_corpus(units: Sequence[Unit], size: int, seed: int) -> list[ReadRequest]:
    """About `size` rows (all of them if there are no more), spread over units in proportion to their rows.

    Which units and rows are drawn depends on the seed and the units' own names, not on their order or number.
    """
    total = sum(unit.rows for unit in units)
    if total <= size:
        return [ReadRequest(unit) for unit in units if unit.rows]
    keyed = sorted(
        (unit for unit in units if unit.rows), key=lambda unit: content_hash(f"{seed}/{unit.unit_id}".encode())
    )
    rows = np.cumsum([unit.rows for unit in keyed])
    number = max(size // MIN_PER_UNIT, int(np.searchsorted(rows, size)) + 1)  # enough units, and enough rows in them
    chosen = keyed[:number]
    share = size / sum(unit.rows for unit in chosen)
    wanted = []
    carried = 0.0
    for unit in chosen:
        carried += share * unit.rows
        take = min(unit.rows, int(carried + 1e-9))
        carried -= take
        if take:
            rng = np.random.default_rng([seed, content_hash(unit.unit_id.encode()) % 2**63])
            wanted.append(ReadRequest(unit, np.sort(rng.choice(unit.rows, take, replace=False))))
    return wanted
