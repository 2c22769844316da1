"""Near-copies: images that look alike, by their perceptual hashes; within U, and across U, P and the test set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.perceptual import BANDS, BITS, PLACE, RADIUS, hash_words, pairs_within, perceptual_hashes
from pukd_ray.corpus.pixels import PixelSpec, Unreadable, decode, encode_png, pixel_spec, stack_pixels
from pukd_ray.corpus.reading import ReadRequest, read_blocks, split_requests
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import DecodeImages
from pukd_ray.corpus.units import Unit
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import NearRecord
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.rows import SelectJob, read_tables
from pukd_ray.selection.scoring import keep_key

MOST_ROWS = 100_000_000
"""Of a corpus: a task holds the hashes of all of it, and ten times the images take a hundred times as long."""
KNOWN_REQUESTS = 32
EXAMPLES = 24
NEAR_FILE = "near.parquet"
"""Of the run folder: some of the pairs that are leaks, with pictures."""
KINDS = ("test", "positives", "corpus")
MAX_SIDE = 64
FIRST = np.iinfo(np.int64).min
"""Order of P and test images: they are never dropped. Their places are -1 - their number."""


def find_near(
    job: SelectJob, groups: list[list[str]], units: Sequence[Unit], exact: Sequence[ray.ObjectRef], n_scored: int
) -> tuple[list[ray.ObjectRef], NearRecord | None]:
    """(places to drop beyond the `exact` copies, what was found) of `groups` of score files, if the config asks for it.

    Of near-copies the first in seeded-hash order stays, as of copies; one with a near-copy before it goes, whether that
    one stays or not.
    """
    if job.config.selection.deduplicate != "near":
        return [], None
    if n_scored > MOST_ROWS:
        raise RunError(f"selection.deduplicate: near is for {MOST_ROWS:,} images at most, here are {n_scored:,}: exact")
    hashed_known = [
        _hash_known.remote(job.config, role, request)
        for role, sources in sources_by_role(job.config).items()
        if role != "corpus"
        for request in split_requests(index_labelled(role, units, sources, job.config.teacher).requests, KNOWN_REQUESTS)
    ]
    known_rows, known = _join_known.remote(*hashed_known)
    hashed = [_hash_rows.remote(job, group, t) for t, group in enumerate(groups)]
    found = [_near_in.remote(known_rows, band, *hashed) for band in range(BANDS)]
    places, record, examples = _join_near.remote(known, len(exact), *exact, *found)
    labelled = [unit for unit in units if unit.role != "corpus"]
    ray.get(_write_examples.remote(job, groups, labelled, known, examples))
    return [places], ray.get(record)


@ray.remote(num_cpus=IO_CPUS)
def _hash_known(config: RunConfig, role: str, request: ReadRequest) -> tuple[list[str], np.ndarray]:
    """(`role/id`, hashes int64 [n, BITS / 64]) of images of P or the test set that have one."""
    spec = pixel_spec(config.teacher)
    names: list[str] = []
    found = [np.zeros((0, BITS // 64), np.int64)]
    for block in read_blocks(request, sources_by_role(config)[role][request.unit.source]):
        decoded = DecodeImages(spec)(block)
        readable = decoded.column("error").is_null().to_numpy(zero_copy_only=False)
        hashes, has = perceptual_hashes(stack_pixels(decoded.column("pixels").to_pylist(), spec))
        ids = np.array(decoded.column("image_id").to_pylist(), dtype=object)[readable][has]
        names += [f"{role}/{name}" for name in ids]
        found.append(hash_words(hashes[has]))
    return names, np.concatenate(found)


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _join_known(*parts: tuple[list[str], np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """(rows of hashes, names by number)."""
    names = [name for part, _ in parts for name in part]
    hashes = np.concatenate([np.zeros((0, BITS // 64), np.int64), *(part for _, part in parts)])
    return np.column_stack([np.full(len(names), FIRST), -1 - np.arange(len(names)), hashes]), names


@ray.remote(num_cpus=IO_CPUS)
def _hash_rows(job: SelectJob, files: list[str], task: int) -> np.ndarray:
    """Rows of hashes of some score files."""
    table = read_tables(job.folder, files, ["image_id", "perceptual_hash"])
    there = np.flatnonzero(table.column("perceptual_hash").is_valid().to_numpy(zero_copy_only=False))
    good = table.take(there)
    ids = [keep_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    hashes = np.frombuffer(b"".join(good.column("perceptual_hash").to_pylist()), np.uint8)
    return np.column_stack([np.array(ids, np.int64), (task << 32) + there, hash_words(hashes.reshape(-1, BITS // 8))])


@ray.remote(num_cpus=1)
def _near_in(known: np.ndarray, band: int, *pieces: np.ndarray) -> np.ndarray:
    """Pairs that one part of the hashes shows, int64 [m, 3]: the place that goes (or, of two known images, one of
    them), the other's, the bits."""
    rows = np.concatenate([known, *pieces])
    pairs = pairs_within(rows, band)
    return np.column_stack([rows[pairs[:, 0], PLACE], rows[pairs[:, 1], PLACE], pairs[:, 2]])


@ray.remote(num_cpus=IO_CPUS, num_returns=3)
def _join_near(known: list[str], n_exact: int, *parts: np.ndarray) -> tuple[np.ndarray, NearRecord, np.ndarray]:
    """(places to drop, sorted and no exact copies; what was found; some pairs to show).

    Holds all near-copies of the corpus: 24 bytes each, for each part that shows it.
    """
    exact, pairs = parts[:n_exact], np.concatenate(parts[n_exact:])
    roles = np.array([KINDS.index(name.partition("/")[0]) for name in known] + [KINDS.index("corpus")])
    kind = np.where(pairs[:, 1] < 0, roles[np.where(pairs[:, 1] < 0, -1 - pairs[:, 1], -1)], roles[-1])
    # One row for each place: its nearest partner of the test set, else of P, else of U.
    order = np.lexsort((pairs[:, 2], kind, pairs[:, 0]))
    pairs, kind = pairs[order], kind[order]
    of_known = pairs[:, 0] < 0
    roles_apart = of_known & (roles[np.where(of_known, -1 - pairs[:, 0], -1)] != kind)
    leaks = pairs[roles_apart]
    leaks = leaks[np.unique(np.sort(leaks[:, :2], axis=1), axis=0, return_index=True)[1]]
    pairs, kind = pairs[~of_known], kind[~of_known]
    first = np.r_[True, pairs[1:, 0] != pairs[:-1, 0]] if len(pairs) else np.zeros(0, bool)
    pairs, kind = pairs[first], kind[first]
    for places in exact:
        new = ~np.isin(pairs[:, 0], places)
        pairs, kind = pairs[new], kind[new]
    counts = np.bincount(kind, minlength=len(KINDS)).tolist()
    record: NearRecord = {
        "bits": BITS,
        "radius": RADIUS,
        "dropped": dict(zip(KINDS, counts, strict=True)),
        "positives_in_test": len(leaks),
    }
    shown = np.concatenate([leaks, pairs[kind == 0], pairs[kind == 1], pairs[kind == 2]])  # the worst first
    return pairs[:, 0], record, shown[:EXAMPLES]


@ray.remote(num_cpus=IO_CPUS)
def _write_examples(
    job: SelectJob, groups: list[list[str]], units: Sequence[Unit], known: list[str], pairs: np.ndarray
) -> None:
    """`NEAR_FILE`: ids, bits and small pictures (PNG) of some pairs; a picture that cannot be fetched is null."""
    places = np.unique(pairs[:, :2])
    names = {place: known[-1 - place] for place in places[places < 0].tolist()}
    images = _images_of_known(job.config, units, set(names.values()))
    pictures = {place: images.get(name) for place, name in names.items()}
    columns = ["image_id", "source", "source_row", "image"]
    for task in np.unique(places[places >= 0] >> 32).tolist():
        mine = places[(places >= 0) & (places >> 32 == task)]
        rows = fetch_images(job.folder, job.config, _take(job.folder, groups[task], columns, mine - (task << 32)))
        ids, data = (rows.column(c).to_pylist() for c in ("image_id", "image"))
        names |= dict(zip(mine.tolist(), (f"corpus/{name}" for name in ids), strict=True))
        pictures |= dict(zip(mine.tolist(), data, strict=True))
    t = job.config.teacher
    spec = PixelSpec(min(t.input_size, MAX_SIDE), t.channels, t.resize)
    one, other = pairs[:, 0].tolist(), pairs[:, 1].tolist()
    table = pa.table(
        {
            "image": pa.array([names[p] for p in one], pa.string()),
            "other": pa.array([names[p] for p in other], pa.string()),
            "bits": pa.array(pairs[:, 2], pa.int32()),
            "image_picture": pa.array([_picture(pictures.get(p), spec) for p in one], pa.binary()),
            "other_picture": pa.array([_picture(pictures.get(p), spec) for p in other], pa.binary()),
        }
    )
    job.folder.write_table(NEAR_FILE, table)


def _take(folder: RunFolder, files: list[str], columns: list[str], rows: np.ndarray) -> pa.Table:
    """Rows counted through all files; one file at a time, as they hold images."""
    start, tables = 0, []
    for file in files:
        size = folder.read_table(file, ["error"]).num_rows
        here = rows[(rows >= start) & (rows < start + size)] - start
        start += size
        if len(here):
            tables.append(folder.read_table(file, columns).take(here))
    return pa.concat_tables(tables)


def _images_of_known(config: RunConfig, units: Sequence[Unit], names: set[str]) -> dict[str, bytes | None]:
    """Encoded images of P or the test set by `role/id`."""
    found: dict[str, bytes | None] = {}
    for role, sources in sources_by_role(config).items():
        wanted = {name.partition("/")[2] for name in names if name.startswith(f"{role}/")}
        for unit in units if wanted else ():
            if unit.role != role:
                continue
            for block in read_blocks(ReadRequest(unit), sources[unit.source]):
                for image_id, image in zip(*(block.column(c).to_pylist() for c in ("image_id", "image")), strict=True):
                    if image_id in wanted:
                        found[f"{role}/{image_id}"] = image
    return found


def _picture(data: bytes | None, spec: PixelSpec) -> bytes | None:
    try:
        return encode_png(decode(data, spec))
    except Unreadable:
        return None
