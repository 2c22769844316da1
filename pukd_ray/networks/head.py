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

    Examples:
        The published head, on the 960 features of a ResNet-34.

        >>> import torch
        >>> from pukd_ray import AttentionHead
        >>> head = AttentionHead(960)
        >>> sum(parameter.numel() for parameter in head.parameters())
        116161
        >>> head(torch.zeros(2, 960)).shape
        torch.Size([2])
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
