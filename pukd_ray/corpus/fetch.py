"""Encoded images of single corpus rows, fetched again from where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pukd_ray.config import RunConfig
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.stored_units import units_holding
from pukd_ray.run.folder import RunFolder


def fetch_images(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    """Fill null images of a table with (source, source_row) from the corpus itself."""
    images = table.column("image").to_pylist()
    for rows, found in fetch_rows(folder, config, table):
        for row, image in zip(rows, found, strict=True):
            images[row] = image
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))


def fetch_rows(folder: RunFolder, config: RunConfig, table: pa.Table) -> Iterator[tuple[list[int], list[bytes | None]]]:
    """(rows of the table, their images), in blocks of bounded bytes: of each row whose image is null, once."""
    missing: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    rows = np.flatnonzero(table.column("image").is_null().to_numpy(zero_copy_only=False))
    places = table.select(["source", "source_row"]).take(rows)
    for i, source, row in zip(rows.tolist(), *(column.to_pylist() for column in places.columns), strict=True):
        missing[source][row].append(i)
    for unit in units_holding(folder, list(missing)) if missing else []:
        if len(unit.files) > 1:
            positions = [i for i, file in enumerate(unit.files) if file in missing]
        else:
            wanted = np.array(list(missing[unit.files[0]]), np.int64) - unit.start
            positions = np.sort(wanted[(wanted >= 0) & (wanted < unit.rows)]).tolist()
        if not positions:
            continue
        for block in read_blocks(ReadRequest(unit, np.array(positions)), config.corpus[unit.source]):
            found = [
                (i, image)
                for source, row, image in zip(
                    *(block.column(c).to_pylist() for c in ("source", "source_row", "image")), strict=True
                )
                for i in missing[source].pop(row, ())
            ]
            yield [i for i, _ in found], [image for _, image in found]
    left = [i for of_file in missing.values() for some in of_file.values() for i in some]
    if left:
        yield left, [None] * len(left)
