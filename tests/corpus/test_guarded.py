"""Images that hang or kill their decoder: real files, on which Pillow really does."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pukd_ray.corpus.guarded import IMAGE_MEMORY, Supervised, decode_guarded
from pukd_ray.corpus.pixels import PixelSpec, decode, encode_png
from pukd_ray.corpus.streaming import DecodeImages

SPEC = PixelSpec(8, 1, "crop")


@contextmanager
def supervised(memory: int = IMAGE_MEMORY) -> Iterator[Supervised]:
    child = Supervised(SPEC, 60, memory)
    try:
        yield child
    finally:
        child.stop()


GOOD = [encode_png(np.full((1, 8, 8), i, np.uint8)) for i in range(5)]
SECONDS = 1.0


@lru_cache(maxsize=1)
def slow() -> bytes:
    """A valid image within all limits that takes its decoder three seconds: noise, wavelet by wavelet (29 MB)."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "JPEG2000", num_resolutions=1)
    return data.getvalue()


def deflated_png(side: int) -> bytes:
    """A legal PNG of `side` x `side` zeros in RGB; some kB."""
    rows = zlib.compress(bytes((1 + 3 * side) * side), 9)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
        for name, body in chunks
    )


def test_the_slow_file_is_an_image() -> None:
    began = time.monotonic()
    assert decode(slow(), SPEC).shape == (1, 8, 8)
    assert time.monotonic() - began > SECONDS


@pytest.mark.parametrize("attempt", [0, 1])
def test_guarded_pixels_are_those_of_the_decoder(attempt: int) -> None:
    images = [GOOD[0], None, b"", b"no image", GOOD[1][:40], *GOOD]
    pixels, reasons = decode_guarded(images, SPEC, attempt)
    assert [r and r.partition(":")[0] for r in reasons] == [
        *(None, "empty", "empty", "not_an_image", "truncated"),
        *[None] * 5,
    ]
    for data, found in zip(GOOD, pixels[5:], strict=True):
        np.testing.assert_array_equal(found, decode(data, SPEC))
        assert found is not None
        found[:] = 0  # it is the reader's own


def test_the_first_attempt_ends_the_process_that_hangs() -> None:
    program = (
        "from test_guarded import *; import threading; "
        "print(decode_guarded([GOOD[0]], SPEC, 0, 1.0)[1], flush=True); "
        "time.sleep(2); print('alive', flush=True); "  # nothing is armed between batches
        "decode_guarded([GOOD[0], slow()], SPEC, 0, 1.0); print('never')"
    )
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout == "[None]\nalive\n", done.stderr
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert time.monotonic() - began < 60


def test_the_second_attempt_names_the_image_that_hangs_and_decodes_the_others() -> None:
    began = time.monotonic()
    pixels, reasons = decode_guarded([GOOD[0], slow(), GOOD[1]], SPEC, 1, SECONDS)
    assert reasons == [None, "timeout: not decoded within 1 s", None]
    assert [p is None for p in pixels] == [False, True, False]
    assert time.monotonic() - began < 60


def test_an_image_that_needs_more_memory_than_there_is() -> None:
    with supervised(400 << 20) as child:
        assert child.decode(GOOD[0])[1] is None
        assert str(child.decode(deflated_png(9000))[1]).startswith("too_large: ")
        assert child.decode(GOOD[1])[1] is None


def test_an_image_on_which_the_process_dies() -> None:
    """Of a signal: the limit of its processor time stands for a decoder that is out of bounds."""
    import resource

    with supervised() as child:
        assert child.decode(GOOD[0])[1] is None
        assert child._process is not None
        resource.prlimit(child._process.pid, resource.RLIMIT_CPU, (1, 2))
        assert child.decode(slow())[1] == "corrupt: it ends the process that decodes it (SIGXCPU)"
        assert child.decode(GOOD[1])[1] is None


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("in_actor", [False, True])
def test_under_ray_a_hanging_image_costs_itself_and_is_tried_twice(in_actor: bool, tmp_path: Path) -> None:
    import ray.data

    class Decode:
        def __init__(self) -> None:
            self.decode = DecodeImages(SPEC, SECONDS)

        def __call__(self, table: pa.Table) -> pa.Table:
            with (tmp_path / "processes").open("a") as log:
                log.write(f"{os.getpid()}\n")
            return self.decode(table).drop_columns(["pixels"])

    images = [*GOOD, slow(), *GOOD]
    table = pa.table({"number": range(11), "image": images, "error": pa.array([None] * 11, pa.string())})
    options: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "num_cpus": 0.5}
    if in_actor:
        rows = ray.data.from_arrow(table).map_batches(Decode, compute=ray.data.ActorPoolStrategy(size=1), **options)
    else:
        rows = ray.data.from_arrow(table).map_batches(lambda t: Decode()(t), **options)
    found = {row["number"]: row["error"] for row in rows.take_all()}
    assert found == {n: "timeout: not decoded within 1 s" if n == 5 else None for n in range(11)}
    assert len((tmp_path / "processes").read_text().split()) == 2
