"""A finished student, ready to use: needs torch and its own two files, neither Ray nor the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pukd_ray.config import TeacherConfig
from pukd_ray.corpus.pixels import PixelSpec, Unreadable, decode
from pukd_ray.networks.teacher import Normalise, load_network
from pukd_ray.storage import open_storage, read_bytes

if TYPE_CHECKING:
    from pukd_ray.run.records import StudentRecord


@dataclass(frozen=True)
class Student:
    """Encoded images in, class probabilities out, with the preprocessing that it was trained with."""

    network: nn.Module
    """Normalised float32 [N, C, S, S] -> logits [N, K]; in eval mode."""
    normalise: nn.Module
    """uint8 [N, C, S, S] -> float32."""
    spec: PixelSpec
    """How an encoded image becomes uint8 pixels."""
    classes: tuple[str, ...]
    """Names in the order of the outputs; numbers as text where the run had no names."""

    @torch.inference_mode()
    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Encoded images -> probabilities float32 [N, K]. ValueError naming the first image that cannot be read."""
        pixels = []
        for i, data in enumerate(images):
            try:
                pixels.append(decode(data, self.spec))
            except Unreadable as error:
                raise ValueError(f"image {i}: {error}") from error
        if not pixels:
            return torch.zeros(0, len(self.classes))
        on_device = torch.from_numpy(np.stack(pixels)).to(next(self.network.parameters()).device)
        logits: Tensor = self.network(self.normalise(on_device))
        return logits.softmax(1)


def load_student(folder: str, device: str = "cpu") -> Student:
    """Load `student.pt` and `meta.json` of a run's `student` folder (path or URI).

    Raises FileNotFoundError if one of them is not there, ValueError if they do not fit each other.
    """
    meta: StudentRecord = json.loads(read_bytes(*open_storage(f"{folder}/meta.json")))
    weights = read_bytes(*open_storage(f"{folder}/student.pt"))
    return assemble_student(meta, weights, f"{folder}/student.pt", torch.device(device))


def assemble_student(meta: StudentRecord, weights: bytes, what: str, device: torch.device) -> Student:
    """The student of such a record and its weights, which messages call `what`. ValueError if they do not fit."""
    classes = tuple(meta["classes"] or map(str, range(meta["num_classes"])))
    teacher = TeacherConfig(
        arch=meta["arch"], weights="student.pt", num_classes=meta["num_classes"], **meta["preprocessing"]
    )
    network = load_network(teacher.arch, teacher, weights, device, what=what)
    spec = PixelSpec(teacher.input_size, teacher.channels, teacher.resize)
    return Student(network, Normalise(teacher).to(device), spec, classes)
