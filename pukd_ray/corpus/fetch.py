"""Encoded images of single corpus rows, fetched again from where they are."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pukd_ray.config import RunConfig
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.units import Unit, units_from_table
from pukd_ray.run.folder import RunFolder


def fetch_images(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    """Fill null images of a table with (source, source_row) from the corpus itself."""
    images = table.column("image").to_pylist()
    missing: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (image, source, row) in enumerate(
        zip(images, table.column("source").to_pylist(), table.column("source_row").to_pylist(), strict=True)
    ):
        if image is None:
            missing[source][row].append(i)
    if not missing:
        return table
    for unit in _units_with(folder, list(missing)):
        if len(unit.files) > 1:
            positions = [i for i, file in enumerate(unit.files) if file in missing]
        else:
            rows = np.array(list(missing[unit.files[0]]), np.int64) - unit.start
            positions = np.sort(rows[(rows >= 0) & (rows < unit.rows)]).tolist()
        if not positions:
            continue
        for block in read_blocks(ReadRequest(unit, np.array(positions)), config.corpus[unit.source]):
            for source, row, image in zip(
                *(block.column(c).to_pylist() for c in ("source", "source_row", "image")), strict=True
            ):
                for i in missing[source][row]:
                    images[i] = image
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))


def _units_with(folder: RunFolder, files: list[str]) -> list[Unit]:
    """Units of the corpus that have one of the files; the others are not made into objects."""
    plan = folder.read_table("plan.parquet").combine_chunks()
    plan = plan.filter(pc.equal(plan.column("role"), "corpus"))
    lists = plan.column("files")
    wanted = pc.is_in(pc.list_flatten(lists), value_set=pa.array(files))
    return units_from_table(plan.take(pc.unique(pc.list_parent_indices(lists).filter(wanted))))
