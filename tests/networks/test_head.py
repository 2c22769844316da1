import json
from pathlib import Path

import pytest
import torch

from pukd_ray.networks.head import AttentionHead

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["attention_head"]


def test_golden_logits():
    head = AttentionHead(8, hidden=4).double()
    head.load_state_dict(
        {
            "reduce.weight": torch.tensor(GOLDEN["W1"], dtype=torch.float64),
            "expand.weight": torch.tensor(GOLDEN["W2"], dtype=torch.float64),
            "classify.weight": torch.tensor([GOLDEN["w"]], dtype=torch.float64),
            "classify.bias": torch.tensor([GOLDEN["b"]], dtype=torch.float64),
        }
    )
    logits = head(torch.tensor(GOLDEN["x"], dtype=torch.float64))
    expected = torch.tensor(GOLDEN["expected"]["logit"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "options", "hidden"),
    [(960, {}, 60), (64, {}, 8), (960, {"reduction": 4}, 240), (64, {"hidden": 3}, 3)],
)
def test_hidden_width(channels, options, hidden):
    head = AttentionHead(channels, **options)
    assert head.reduce.weight.shape == (hidden, channels)
    assert head.expand.weight.shape == (channels, hidden)


def test_size_of_the_papers_head():
    assert sum(parameter.numel() for parameter in AttentionHead(960).parameters()) == 116_161


def test_one_logit_per_image_even_for_a_single_one():
    assert AttentionHead(16)(torch.zeros(1, 16)).shape == (1,)


def test_rejects_empty_widths():
    with pytest.raises(ValueError, match="at least 1"):
        AttentionHead(16, hidden=0)
