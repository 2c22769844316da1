"""Single images of a run by their ids: what the pass and the rule said of them, and their encoded bytes.

Read from the run's own tables, file by file, without Ray; bytes that the pass did not keep come from the corpus.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pukd_ray.config import RunConfig
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.errors import PlaceError, RunError
from pukd_ray.run.folder import SCORES_SCHEMA, RunFolder
from pukd_ray.run.records import SELECTOR
from pukd_ray.selection.chunks import score_files

READ_THREADS = 8
_NAME_CHARS = 80


def find_images(folder: RunFolder, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `scores/` with these ids, in their order, and whether each is `selected`; `image` may be None.

    Reads the ids of all scored images, 8 files at a time. RunError naming the ids that no finished chunk has.
    """
    wanted = pa.array(list(dict.fromkeys(ids)), pa.string())
    found: dict[str, dict[str, Any]] = {}
    for file, rows in _rows_with(folder, score_files(folder), wanted):
        for row in _read_rows(folder, file, rows):
            found[row["image_id"]] = row
    missing = [i for i in wanted.to_pylist() if i not in found]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if missing[1:] else ""
        raise RunError(
            f"{folder.display}: no image {missing[0]!r}{more} is scored: ids are those of `image_id` in scores/, and "
            "of the report's gallery"
        )
    parts = [file for file in folder.files("selected") if file.endswith(".parquet")]
    taken = {
        i
        for file, rows in _rows_with(folder, parts, wanted)
        for i in folder.read_table(file, ["image_id"]).column("image_id").take(rows).to_pylist()
    }
    return [found[i] | {"selected": i in taken} for i in wanted.to_pylist()]


def _rows_with(folder: RunFolder, files: Sequence[str], ids: pa.Array) -> list[tuple[str, np.ndarray]]:
    """(file, rows of it, int64) of the files that have some of the ids."""

    def rows_of(file: str) -> np.ndarray:
        column = folder.read_table(file, ["image_id"]).column("image_id")
        return np.flatnonzero(pc.is_in(column, value_set=ids).to_numpy(zero_copy_only=False))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [(file, rows) for file, rows in zip(files, pool.map(rows_of, files), strict=True) if len(rows)]


def _read_rows(folder: RunFolder, file: str, rows: np.ndarray) -> list[dict[str, Any]]:
    """Whole rows of a score file, of which only the row groups that hold them are read."""
    found: list[dict[str, Any]] = []
    start = 0
    with folder.open(file) as source:
        parquet = pq.ParquetFile(source)
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if not ((rows >= start) & (rows < start + count)).any():
                start += count
                continue
            for batch in parquet.iter_batches(batch_size=1024, row_groups=[group]):
                here = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
                found += batch.take(pa.array(here)).to_pylist()
                start += batch.num_rows
    return found


def with_bytes(folder: RunFolder, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `image` fetched from the corpus where the pass did not keep it; None where that fails, with why in
    `picture`."""
    filled = []
    for row in rows:
        table = pa.Table.from_pylist([dict(row)], schema=SCORES_SCHEMA)
        try:
            image, why = fetch_images(folder, config, table).column("image")[0].as_py(), "its bytes are not to be had"
        except PlaceError as error:
            image, why = None, str(error)
        filled.append({**row, "image": image, "picture": None if image else why})
    return filled


def write_picture(target: Path, number: int, row: Mapping[str, Any]) -> Path:
    """Write a row's encoded bytes as they are; the file's name has the number and what of the id fits into one."""
    data: bytes = row["image"]
    try:
        with Image.open(io.BytesIO(data)) as opened:  # the header alone
            suffix = f".{(opened.format or 'bin').lower()}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        suffix = ".bin"
    name = re.sub(r"[^\w.-]+", "_", row["image_id"])[-_NAME_CHARS:]
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"{number:03d}-{name.removesuffix(suffix)}{suffix}"
    file.write_bytes(data)
    return file


def show_lines(folder: RunFolder, config: RunConfig, ids: Sequence[str], pictures: Path) -> list[str]:
    """What is known of each image, for people; writes their bytes into the folder `pictures`."""
    selector = folder.find_record(SELECTOR)
    names = (selector["classes"] if selector else None) or config.teacher.class_names or ()
    lines = []
    for number, row in enumerate(with_bytes(folder, config, find_images(folder, ids)), 1):
        lines += [row["image_id"], f"  source        {row['source']} row {row['source_row']}"]
        lines += map(partial(str.format, "  {:<13} {}"), *zip(*_facts(row, names), strict=True))
        shown = row["picture"] or f"{write_picture(pictures, number, row)} ({len(row['image']):,} bytes)"
        lines.append(f"  picture       {shown}")
    return lines


def _facts(row: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(what, value) of a row of scores."""
    truth = [] if row["relevant"] is None else [("truth", "relevant" if row["relevant"] else "not relevant")]
    if row["error"] is not None:
        return [("unreadable", row["error"]), *truth]
    label = row["teacher_label"]
    more = [(k, f"{v:.4f}") for k, v in row.items() if isinstance(v, float) and k not in SCORES_SCHEMA.names]
    return [
        ("P(relevant)", f"{row['pu_probability']:.4f}, logit {row['pu_logit']:.4f}"),
        ("selected", "yes" if row["selected"] else "no"),
        (
            "teacher",
            f"{names[label] if label < len(names) else f'class {label}'}, confidence {row['teacher_confidence']:.4f}, "
            f"entropy {row['teacher_entropy']:.4f} nats",
        ),
        *truth,
        *more,
    ]
