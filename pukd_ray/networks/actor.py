"""The teacher on the actors of a streaming pass. torch is imported in the actors: nothing else of a pass needs it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from pukd_ray.config import TeacherConfig
from pukd_ray.corpus.context import Shared
from pukd_ray.corpus.pixels import pixel_spec, stack_pixels
from pukd_ray.corpus.streaming import TimedActor
from pukd_ray.runtime.devices import assigned_device, use_threads


class TeacherActor(TimedActor):
    """Runs the teacher on decoded rows; subclasses say what to keep of it."""

    def __init__(self, teacher: TeacherConfig, weights: Shared, grid: int | Literal["auto"]) -> None:
        from pukd_ray.networks.teacher import Teacher

        use_threads()
        self.spec = pixel_spec(teacher)
        self.teacher = Teacher(teacher, weights.get(), assigned_device(), grid)

    def extract(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, C, H, W] -> (features [n, F], teacher's logits [n, K]), float32."""
        features, logits = self.teacher(pixels)
        return features.cpu().numpy(), logits.cpu().numpy()

    def forward(self, table: pa.Table) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(table with new reasons, readable [N] bool, and of these pixels, features and logits as of `extract`)."""
        errors = table.column("error").to_pylist()
        readable = np.array([error is None for error in errors])
        pixels = stack_pixels(table.column("pixels").to_pylist(), self.spec)
        features, logits = np.zeros((0, self.teacher.extractor.channels), np.float32), np.zeros((0, 1), np.float32)
        if readable.any():
            features, logits = self.extract(pixels)
            finite = np.isfinite(features).all(1) & np.isfinite(logits).all(1)
            if not finite.all():
                rows = np.flatnonzero(readable)[~finite]
                for i in rows:
                    errors[i] = "nonfinite: the teacher's output on this image is not finite"
                readable[rows] = False
                pixels, features, logits = pixels[finite], features[finite], logits[finite]
                table = table.set_column(table.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
        return table.drop_columns("pixels"), readable, pixels, features, logits


def teacher_prediction(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label int32, max softmax float32, entropy float32 in nats) of logits [n, K]."""
    z = logits.astype(np.float64)
    if not len(z):
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    z -= z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    p = np.exp(log_p)
    return p.argmax(1).astype(np.int32), p.max(1).astype(np.float32), -(p * log_p).sum(1).astype(np.float32)
