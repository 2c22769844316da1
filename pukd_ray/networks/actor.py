"""The teacher on the actors of a streaming pass. torch is imported in the actors: nothing else of a pass needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from pukd_ray.config import TeacherConfig
from pukd_ray.corpus.context import Shared
from pukd_ray.corpus.pixels import PixelSpec, pixel_spec, stack_pixels
from pukd_ray.corpus.streaming import TimedActor
from pukd_ray.runtime.devices import BatchRunner, Precision, assigned_device, half_type, use_threads

if TYPE_CHECKING:
    from torch import Tensor


class TeacherActor(TimedActor):
    """Runs the teacher on decoded rows; subclasses say what to keep of it."""

    def __init__(
        self, teacher: TeacherConfig, weights: Shared, grid: int | Literal["auto"], precision: Precision = "auto"
    ) -> None:
        from pukd_ray.networks.teacher import Teacher

        use_threads()
        self.spec = pixel_spec(teacher)
        device = assigned_device()
        self.teacher = Teacher(teacher, weights.get(), device, grid, precision)
        self.run = BatchRunner(self.columns, device)
        """uint8 [n, C, H, W] -> `columns` on the host."""

    def columns(self, pixels: Tensor, precision: Precision | None = None) -> dict[str, Tensor]:
        """What the host gets of a batch uint8 [b, C, H, W] on the device: `finite` bool [b], and what to keep of it;
        here `features` float16 [b, F], `last_tap` float16 [b, C] and the columns of `teacher_opinion`."""
        from pukd_ray.networks.selector import as_cached
        from pukd_ray.networks.teacher import all_finite, teacher_opinion

        features, logits = self.teacher(pixels, precision)
        return {
            "finite": all_finite(features, logits),
            "features": as_cached(features),
            "last_tap": as_cached(self.teacher.last_tap(features)),
            **teacher_opinion(logits),
        }

    def forward(self, table: pa.Table) -> tuple[pa.Table, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """(table with new reasons, readable [N] bool, and of these pixels and `columns`)."""
        errors = table.column("error").to_pylist()
        readable = np.array([error is None for error in errors])
        pixels = pixel_rows(table.column("pixels"), self.spec)
        if len(pixels):
            found = self.run(pixels)
        else:  # what no image is there for has a type and a width all the same
            found = {name: column[:0] for name, column in self.run(np.zeros((1, *self.spec.shape), np.uint8)).items()}
        if not found["finite"].all() and half_type(self.teacher.device, self.teacher.precision):
            beyond = ~found["finite"]  # of 16 bits, perhaps, and not of 32
            for name, column in self.run(pixels[beyond], precision="float32").items():
                found[name][beyond] = column
        finite = found.pop("finite")
        if not finite.all():
            rows = np.flatnonzero(readable)[~finite]
            for i in rows:
                errors[i] = "nonfinite: the teacher's output on this image is not finite"
            readable[rows] = False
            pixels, found = pixels[finite], {name: column[finite] for name, column in found.items()}
            table = table.set_column(table.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
        return table.drop_columns("pixels"), readable, pixels, found


def pixel_rows(column: pa.ChunkedArray, spec: PixelSpec) -> np.ndarray:
    """Raw pixels without the nulls -> uint8 [n, C, H, W]; where they lie side by side, not copied, and read-only."""
    if column.num_chunks == 1:
        (chunk,) = column.chunks
        _, offsets, values = chunk.buffers()
        if values is not None:
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            rows = len(chunk) - chunk.null_count
            if ends[-1] - ends[0] == rows * int(np.prod(spec.shape)):
                return np.frombuffer(values, np.uint8)[ends[0] : ends[-1]].reshape(rows, *spec.shape)
    return stack_pixels(column.to_pylist(), spec)
