"""The networks of the selector: a head on multi-scale features, alone or together with its trunk."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pukd_ray.networks.features import MultiScaleExtractor
from pukd_ray.networks.head import AttentionHead

WIDTH = 128
DROPOUT = 0.3  # share of features left out: P is small, and no single one should decide


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

    def standardise_by(self, features: np.ndarray) -> None:
        """Take mean and deviation from features [N, channels] of U, any float dtype."""
        sums = np.zeros((2, features.shape[1]))
        for rows in np.array_split(features, max(1, len(features) // 8192)):  # float64 of all at once would be large
            values = rows.astype(np.float64)
            sums += np.stack([values.sum(0), (values**2).sum(0)])
        mean, square = sums / len(features)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        self.mean.copy_(torch.from_numpy(mean))
        # A dimension that never varies carries nothing; dividing by its rounding noise would.
        self.std.copy_(torch.from_numpy(np.where(std > 1e-4, std, 1.0)))

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """As the class says; `kept` bool [B, channels] is the dropout mask of training.

        It comes from outside so that it is the same for any number of workers.
        """
        x = (features - self.mean) / self.std
        if kept is not None:
            x = x * kept / (1 - DROPOUT)
        logits: Tensor = self.attention(F.relu(self.hidden(x)))
        return logits


class PixelSelector(nn.Module):
    """Pixels [B, C, H, W] in [0, 255] -> PU logits [B]: normalised, through the trunk, to the head.

    The trunk has to be in eval mode, also while it is trained (docs/method.md, "The attention head and the features"):
    BatchNorm then uses the teacher's statistics, since those of batches that are a quarter P would not be the
    corpus's. Parameters that features do not depend on, such as the classifier's, are frozen: data-parallel training
    waits for every gradient.
    """

    def __init__(self, extractor: MultiScaleExtractor, normalise: nn.Module, head: SelectorHead) -> None:
        super().__init__()
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
        logits: Tensor = self.head(self.extractor(self.normalise(pixels)), kept)
        return logits
