"""Images fetched again from where they are: by (file, row), in any order, some twice."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_files import many_formats, units_of

from pukd_ray.corpus import fetch, units
from pukd_ray.corpus.fetch import fetch_images, fetch_rows
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.units import units_to_table
from pukd_ray.run.folder import RunFolder


def test_images_come_from_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_ROWS", 6)
    monkeypatch.setattr(units, "UNIT_FILES", 7)
    (tmp_path / "data").mkdir()
    sources = list(many_formats(tmp_path / "data").values())[:6]
    planned = [replace(unit, source=i) for i, source in enumerate(sources) for unit in units_of(source)]
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_table("plan.parquet", units_to_table([*planned, replace(planned[0], role="test", unit_id="x")]))
    rows = [row for unit in planned for row in read_rows(unit, sources[unit.source])]
    chosen = np.random.default_rng(0).choice(len(rows), 60)
    kept = [rows[i].image if i % 5 == 0 else None for i in chosen]
    table = pa.table(
        {
            "source": [rows[i].source for i in chosen],
            "source_row": [rows[i].row for i in chosen],
            "image": pa.array(kept, pa.binary()),
        }
    )
    read: list[str] = []
    blocks = fetch.read_blocks

    def counted(request: Any, source: Any) -> Any:
        read.append(request.unit.unit_id)
        return blocks(request, source)

    monkeypatch.setattr(fetch, "read_blocks", counted)
    config: Any = SimpleNamespace(corpus=sources)
    assert fetch_images(folder, config, table).column("image").to_pylist() == [rows[i].image for i in chosen]
    assert len(read) == len(set(read)) <= len(planned)
    read.clear()
    one = fetch_images(folder, config, table.slice(1, 1))
    assert one.column("image").to_pylist() == [rows[chosen[1]].image]
    assert len(read) <= 1
    # Each row without an image comes once, one of no file that was planned too.
    some = table.append_column("n", pa.array(range(60)))
    lost = pa.table(
        {"source": ["nowhere", rows[0].source], "source_row": [0, 99_999], "image": [None, None], "n": [60, 61]}
    )
    some = pa.concat_tables([some, lost.cast(some.schema)])
    blocks_of = list(fetch_rows(folder, config, some))
    assert (
        sorted(i for places, _ in blocks_of for i in places) == np.flatnonzero(some.column("image").is_null()).tolist()
    )
    found = {i: image for places, images in blocks_of for i, image in zip(places, images, strict=True)}
    assert (found[60], found[61]) == (None, None)
    assert len(blocks_of) > 5
