"""The networks of the selector: a head on multi-scale features, alone or together with its trunk."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pukd_ray.networks.features import MultiScaleExtractor
from pukd_ray.networks.head import AttentionHead
from pukd_ray.networks.teacher import load_state
from pukd_ray.runtime.devices import Precision, autocast

WIDTH = 128
DROPOUT = 0.3  # share of features left out: P is small, and no single one should decide


def moments(features: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation) [channels], float64, of features [N, channels] of any float dtype, where they lie.

    The deviation of a dimension that never varies is 1: it carries nothing, and dividing by its rounding noise would.
    """
    pieces = max(1, len(features) // 8192)  # float64 of all at once would be large
    if isinstance(features, np.ndarray):
        host = np.zeros((2, features.shape[1]))
        for rows in np.array_split(features, pieces):
            values = rows.astype(np.float64)
            host += np.stack([values.sum(0), (values**2).sum(0)])
        sums = torch.from_numpy(host)
    else:
        sums = torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
        for piece in features.tensor_split(pieces):
            wide = piece.double()
            sums += torch.stack([wide.sum(0), (wide**2).sum(0)])
    mean, square = sums / len(features)
    std = (square - mean**2).clamp(min=0).sqrt()
    return mean, torch.where(std > 1e-4, std, 1.0)


def as_cached(features: Tensor) -> Tensor:
    """float16 of features of any shape, as the cache holds them that all is trained on."""
    return features.clamp(-65504, 65504).half()


class SelectorHead(nn.Module):
    """Features [B, channels] -> PU logits [B]: standardised, one hidden layer, then attention.

    The hidden layer is there because pooled features separate classes hardly in a linear way. `mean` and
    `std` [channels] are buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.hidden = nn.Linear(channels, width)
        self.attention = AttentionHead(width)

    def standardise_by(self, features: np.ndarray | Tensor) -> None:
        """Take mean and deviation from features [N, channels] of U, any float dtype."""
        mean, std = moments(features)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """As the class says; `kept` bool [B, channels] is the dropout mask of training.

        It comes from outside so that it is the same for any number of workers.
        """
        x = (features - self.mean) / self.std
        if kept is not None:
            x = x * kept / (1 - DROPOUT)
        logits: Tensor = self.attention(F.relu(self.hidden(x)))
        return logits


def load_head(data: bytes) -> tuple[SelectorHead, float]:
    """(head in eval mode on the CPU, log max phi) of `selector/head.pt`."""
    state = dict(load_state(data))
    scale = float(state.pop("log_max_phi"))
    head = SelectorHead(state["mean"].numel())
    head.load_state_dict(state)
    return head.eval(), scale


class PixelSelector(nn.Module):
    """Pixels [B, C, H, W] in [0, 255] -> PU logits [B]: normalised, through the trunk, to the head.

    The trunk has to be in eval mode, also while it is trained (docs/method.md, "The attention head and the features"):
    BatchNorm then uses the teacher's statistics, since those of batches that are a quarter P would not be the
    corpus's. Parameters that features do not depend on, such as the classifier's, are frozen: data-parallel training
    waits for every gradient.
    """

    def __init__(
        self,
        extractor: MultiScaleExtractor,
        normalise: nn.Module,
        head: SelectorHead,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.extractor, self.normalise, self.head = extractor, normalise, head

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self.head.channels

    def freeze_unused(self, pixels: Tensor) -> None:
        """Freeze what gets no gradient from these pixels."""
        self(pixels).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """As the class says; `kept` as in `SelectorHead.forward`."""
        with autocast(pixels.device, self.precision, learns=torch.is_grad_enabled()):
            features = self.extractor(self.normalise(pixels))
        logits: Tensor = self.head(features.float(), kept)
        return logits
