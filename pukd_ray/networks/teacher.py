"""The teacher as actors and workers hold it: weights loaded, preprocessing on the device, one forward."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pukd_ray.config import TeacherConfig
from pukd_ray.networks.features import MultiScaleExtractor
from pukd_ray.networks.found import read_checkpoint
from pukd_ray.networks.zoo import build_network, find_start, load_weights, put_weights
from pukd_ray.runtime.devices import Precision, autocast, for_inference, set_up

WIDEST_GRID = 4096  # features per image, 8 KB in the cache, up to which grid `auto` goes for 3 x 3 or 2 x 2 cells


def load_state(data: bytes) -> Mapping[str, Tensor]:
    """A state_dict from bytes: tensors only, nothing executed. ValueError if there is none."""
    state: Mapping[str, Tensor] = read_checkpoint(data).content
    return state


def dump_state(state: Mapping[str, Tensor]) -> bytes:
    """Inverse of `load_state`."""
    kept = OrderedDict((k, v.detach().cpu()) for k, v in state.items())
    if versions := getattr(state, "_metadata", None):  # of the layers; torchvision's MNASNet loads nothing without
        kept.__dict__["_metadata"] = versions
    sink = io.BytesIO()
    torch.save(kept, sink)
    return sink.getvalue()


def dump_safetensors(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """The state_dict as safetensors; `about` and what torch keeps beside the tensors (`_metadata`) go into its header,
    each value as JSON."""
    from safetensors.torch import save

    header = {"format": "pt"} | {name: json.dumps(value) for name, value in about.items()}
    header["_metadata"] = json.dumps(getattr(state, "_metadata", {}))
    # Clones: safetensors refuses tensors that share their memory.
    return save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, header)


def new_network(arch: str, teacher: TeacherConfig) -> nn.Module:
    """A network of the teacher's input and output format, randomly initialised."""
    return build_network(
        arch, num_classes=teacher.num_classes, channels=teacher.channels, input_size=teacher.input_size
    )


def begun_network(arch: str, teacher: TeacherConfig, start: bytes | None) -> nn.Module:
    """Such a network to train: from a file of weights as `find_start` takes them; None: random."""
    network = new_network(arch, teacher)
    if start is not None:
        shape = {"channels": teacher.channels, "input_size": teacher.input_size}
        put_weights(network, find_start(network, load_state(start), arch, **shape))
    return network


def load_network(arch: str, teacher: TeacherConfig, weights: bytes, device: torch.device, *, what: str) -> nn.Module:
    """Such a network with weights, in eval mode."""
    network = new_network(arch, teacher)
    load_weights(network, load_state(weights), what=what)
    return for_inference(network, device)


class Normalise(nn.Module):
    """uint8 [B, C, H, W] -> float32, (x / 255 - mean) / std per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, teacher: TeacherConfig) -> None:
        super().__init__()
        mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in teacher.normalisation)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        """As the class says."""
        return pixels.float() * self.scale + self.shift


class Teacher:
    """Frozen teacher: pixels in, multi-scale features and logits out."""

    def __init__(
        self,
        config: TeacherConfig,
        weights: bytes,
        device: torch.device,
        grid: int | Literal["auto"] = 1,
        precision: Precision = "auto",
    ) -> None:
        self.device, self.precision = device, precision
        set_up(device, precision)
        network = load_network(config.arch, config, weights, device, what="teacher.weights")
        shape = (config.channels, config.input_size, config.input_size)
        for cells in (3, 2, 1) if grid == "auto" else (grid,):
            self.extractor = MultiScaleExtractor(network, config.taps, input_shape=shape, grid=cells)
            if self.extractor.channels <= WIDEST_GRID:
                break
        self.extractor.eval()
        self.normalise = Normalise(config).to(device)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray | Tensor, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
        """uint8 [B, C, H, W] -> (features [B, F], logits [B, K]), float32, on the device; computed in the teacher's
        precision, or in this one."""
        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(pixels)
        with autocast(self.device, precision or self.precision):
            features, logits = self.extractor.features_and_logits(self.normalise(pixels.to(self.device)))
        return features.float(), logits.float()

    def last_tap(self, features: Tensor) -> Tensor:
        """The last tap's channels [n, C] of features [n, F], each averaged over its grid cells."""
        channels, cells = self.extractor.last_tap
        return features[:, -channels * cells :].reshape(len(features), channels, cells).mean(2)


def all_finite(*outputs: Tensor) -> Tensor:
    """Of which rows all of these [B, ...] are finite, bool [B]."""
    return torch.stack([output.flatten(1).isfinite().all(1) for output in outputs]).all(0)


def teacher_opinion(logits: Tensor) -> dict[str, Tensor]:
    """Of logits [B, K], by the names of columns: `teacher_label` int32, `teacher_confidence` float32 (max softmax) and
    `teacher_entropy` float32 (nats), [B] each."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return {
        "teacher_label": logits.argmax(1).int(),
        "teacher_confidence": p.amax(1).float(),
        "teacher_entropy": -(p * log_p).sum(1).float(),
    }
