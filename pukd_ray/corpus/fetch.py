"""Encoded images of single corpus rows, fetched again from where they are."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa

from pukd_ray.config import RunConfig
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.units import units_from_table
from pukd_ray.run.folder import RunFolder


def fetch_images(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    """Fill null images of a table with (source, source_row) from the corpus itself."""
    images = table.column("image").to_pylist()
    missing: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for i, (image, source, row) in enumerate(
        zip(images, table.column("source").to_pylist(), table.column("source_row").to_pylist(), strict=True)
    ):
        if image is None:
            missing[source, row].append(i)
    if not missing:
        return table
    wanted_files = {source for source, _ in missing}
    for unit in units_from_table(folder.read_table("plan.parquet")):
        if unit.role != "corpus" or wanted_files.isdisjoint(unit.files):
            continue
        positions = [i for i in range(unit.rows) if unit.place(i) in missing]
        if not positions:
            continue
        for block in read_blocks(ReadRequest(unit, np.array(positions)), config.corpus[unit.source]):
            for source, row, image in zip(
                *(block.column(c).to_pylist() for c in ("source", "source_row", "image")), strict=True
            ):
                for i in missing[source, row]:
                    images[i] = image
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
