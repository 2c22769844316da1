"""Input formats: one module each. A new one is a module here, a line in `FORMATS`, and its name in `SourceConfig`."""

from __future__ import annotations

from collections.abc import Mapping

from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.formats.cifar import CIFAR
from pukd_ray.corpus.formats.idx import IDX
from pukd_ray.corpus.formats.images import IMAGES
from pukd_ray.corpus.formats.jsonl import JSONL
from pukd_ray.corpus.formats.parquet import PARQUET
from pukd_ray.corpus.formats.webdataset import WEBDATASET

FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        PARQUET,
        WEBDATASET,
        IDX,
        CIFAR,
        JSONL,
        IMAGES,
    )
}
"""By name; a file that several formats would claim belongs to the first of them."""
