"""The attention head: one logit per image from its multi-scale features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionHead(nn.Module):
    """Squeeze-excite gate on the features, then a linear classifier.

    `classify(x * sigmoid(expand(relu(reduce(x)))))` for features x [B, channels] float -> logits [B], in the
    same dtype. `reduce` [hidden, channels] and `expand` [channels, hidden] have no bias.
    Features are expected to be standardised by the caller. A width below 1 raises ValueError.

    Source: the head of the authors' code for Xu et al., "Positive-Unlabeled Compression on the Cloud", 2019;
    the gate is that of Hu et al., "Squeeze-and-Excitation Networks", 2018.
    """

    def __init__(self, channels: int, reduction: int = 16, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is None:
            hidden = max(8, channels // reduction)
        if channels < 1 or hidden < 1:
            raise ValueError(f"channels and hidden must be at least 1, not {channels} and {hidden}")
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)
        self.classify = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, channels] -> logits [B]."""
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(features))))
        logits: Tensor = self.classify(features * gate)
        return logits.squeeze(-1)
