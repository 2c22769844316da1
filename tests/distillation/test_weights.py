"""Class weights and worst-case weights: golden.json, and properties that pin the closed forms down."""

import json
import math
from pathlib import Path

import pytest
import torch

from pukd_ray.distillation.weights import BALLS, class_weights, sampled_worst_case, worst_case_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@PRECISIONS
def test_class_weights_golden(dtype, rtol):
    case = GOLDEN["rkd_class_weights"]
    sums = torch.tensor(case["teacher_logits"], dtype=dtype).softmax(1).sum(0)
    torch.testing.assert_close(sums.double(), double(case["expected"]["softmax_sums"]), rtol=rtol, atol=0)
    weights = class_weights(sums)
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(case["expected"]["sum_of_weights"], rel=1e-12)
    torch.testing.assert_close(weights, double(case["expected"]["weights"]), rtol=rtol, atol=0)
    given = case["from_sums"]
    weights = class_weights(torch.tensor(given["softmax_sums"], dtype=dtype))
    torch.testing.assert_close(weights, double(given["expected_weights"]), rtol=rtol, atol=0)


def test_class_weights_of_hard_counts_and_of_huge_ratios():
    assert class_weights(torch.tensor([1, 1, 2])).tolist() == pytest.approx([1.2, 1.2, 0.6])
    extreme = class_weights(double([1e-310, 1.0]))  # 1 / 1e-310 is infinite
    assert extreme.tolist() == pytest.approx([2.0, 2e-310])


def test_smoothing_adds_a_share_of_the_mean_sum():
    # N = 8, K = 4: 0.5 * 8 / 4 = 1 is added to each
    weights = class_weights(double([0, 1, 3, 4]), smoothing=0.5)
    torch.testing.assert_close(weights, class_weights(double([1, 2, 4, 5])), rtol=1e-15, atol=0)


def test_clipped_weights_are_scaled_to_sum_k():
    sums = double([1000, 1000, 1])
    raw = class_weights(sums)
    clipped = raw.clamp(0.1, 2.0)
    got = class_weights(sums, clip=(0.1, 2.0))
    torch.testing.assert_close(got, clipped * 3 / clipped.sum(), rtol=1e-15, atol=0)
    assert got.sum().item() == pytest.approx(3)
    assert raw.max() / raw.min() > got.max() / got.min()


@pytest.mark.parametrize(
    ("sums", "options", "message"),
    [
        ([1.0, 0.0, 0.0], {}, r"\[1, 2\].*set smoothing"),
        ([0.0, 0.0], {"smoothing": 1e-3}, "set smoothing"),
        ([1.0, -1e-9], {}, "finite and >= 0"),
        ([1.0, math.nan], {}, "finite and >= 0"),
        ([1.0, math.inf], {}, "finite and >= 0"),
        ([], {}, r"\[K\]"),
        ([[1.0, 2.0]], {}, r"\[K\]"),
        ([1.0, 2.0], {"smoothing": -1.0}, "smoothing"),
        ([1.0, 2.0], {"smoothing": math.nan}, "smoothing"),
        ([1.0, 2.0], {"clip": (0.0, 1.0)}, "clip"),
        ([1.0, 2.0], {"clip": (2.0, 1.0)}, "clip"),
    ],
)
def test_class_weights_refuse(sums, options, message):
    with pytest.raises(ValueError, match=message):
        class_weights(torch.tensor(sums), **options)


@PRECISIONS
@pytest.mark.parametrize("ball", BALLS)
def test_closed_forms_golden(ball, dtype, rtol):
    case = GOLDEN["rkd_loss"]["closed_form"]
    base = torch.tensor(case["base_weights"], dtype=dtype)
    loss = torch.tensor(case["per_class_loss"], dtype=dtype)
    weights = worst_case_weights(base, loss, case["epsilon"], ball)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, double(case[ball]["weights"]), rtol=rtol, atol=0)
    assert (weights * loss).sum().item() == pytest.approx(case[ball]["loss"], rel=rtol)


def random_step(ball, radius, count, num_classes):
    """Steps on or within the ball, most of them on its surface."""
    step = torch.randn(count, num_classes, dtype=torch.float64)
    if ball.endswith("sum_zero"):
        step -= step.mean(1, keepdim=True)
    norm = step.norm(dim=1, keepdim=True) if ball.startswith("l2") else step.abs().amax(1, keepdim=True)
    shrink = torch.where(torch.rand(count, 1) < 0.8, 1.0, torch.rand(count, 1)).double()
    return radius * shrink * step / norm.clamp(min=1e-300)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("num_classes", [2, 3, 4, 7, 10])
def test_nothing_within_the_ball_is_worse(ball, num_classes):
    torch.manual_seed(num_classes)
    for epsilon in (0.1, 5.0):  # the second is cut down to min(base)
        base = class_weights(torch.rand(num_classes) + 0.05)
        loss = torch.rand(num_classes, dtype=torch.float64) ** 2
        radius = min(epsilon, base.min().item())
        weights = worst_case_weights(base, loss, epsilon, ball)

        step = weights - base
        size = step.norm() if ball.startswith("l2") else step.abs().max()
        assert size.item() == pytest.approx(radius, rel=1e-9)
        assert bool((weights >= 0).all())
        if ball.endswith("sum_zero"):
            assert weights.sum().item() == pytest.approx(num_classes, rel=1e-12)

        others = base + random_step(ball, radius, 4000, num_classes)
        assert (others @ loss).max() <= weights @ loss + 1e-12
        # Nor is anything nearby, stepping from the optimum back into the ball.
        near = step + random_step(ball, radius / 50, 4000, num_classes)
        scale = near.norm(dim=1) if ball.startswith("l2") else near.abs().amax(1)
        near = base + near / (scale / radius).clamp(min=1)[:, None]
        assert (near @ loss).max() <= weights @ loss + 1e-12


def test_ties_go_to_the_lower_class_index():
    base = torch.ones(5, dtype=torch.float64)
    weights = worst_case_weights(base, double([1, 2, 1, 2, 1]), 0.1, "linf_sum_zero")
    assert weights.tolist() == pytest.approx([1.0, 1.1, 0.9, 1.1, 0.9])
    weights = worst_case_weights(base, double([2, 2, 2, 0, 0]), 0.1, "linf_sum_zero")
    assert weights.tolist() == pytest.approx([1.1, 1.1, 1.0, 0.9, 0.9])


@pytest.mark.parametrize("ball", BALLS)
def test_no_loss_leaves_the_base(ball):
    base = double([0.5, 1.0, 1.5])
    assert torch.equal(worst_case_weights(base, torch.zeros(3), 0.1, ball), base)
    assert torch.equal(worst_case_weights(base, torch.rand(3), 0.0, ball), base)


@pytest.mark.parametrize("ball", ["l2_sum_zero", "linf_sum_zero"])
@pytest.mark.parametrize("num_classes", [1, 3, 10, 1000])
def test_equal_losses_leave_the_base_of_sum_zero_balls(ball, num_classes):
    """0.1 has no exact mean: without care its rounding error becomes a step of full length."""
    base = torch.ones(num_classes, dtype=torch.float64)
    assert torch.equal(worst_case_weights(base, torch.full_like(base, 0.1), 0.1, ball), base)


def test_nearly_equal_losses_keep_the_sum():
    base = torch.ones(1000, dtype=torch.float64)
    loss = torch.full_like(base, 0.1)
    loss[3] += 1e-16  # the next number above 0.1 is 1.4e-17 away
    weights = worst_case_weights(base, loss, 0.1, "l2_sum_zero")
    assert weights.sum().item() == pytest.approx(1000, rel=1e-14)
    assert weights.argmax() == 3


def test_tiny_losses_do_not_underflow():
    weights = worst_case_weights(torch.ones(2), double([3e-300, 4e-300]), 0.1, "l2")
    assert weights.tolist() == pytest.approx([1.06, 1.08])


@pytest.mark.parametrize(
    ("base", "loss", "epsilon", "ball", "message"),
    [
        ([1.0, 1.0], [0.1, 0.2], 0.1, "l1", "ball must be one of"),
        ([1.0, 1.0], [0.1, 0.2], 0.1, "draws", "ball must be one of"),
        ([1.0, 1.0], [0.1, 0.2, 0.3], 0.1, "l2", r"\[K\]"),
        ([[1.0]], [[0.1]], 0.1, "l2", r"\[K\]"),
        ([1.0, -0.1], [0.1, 0.2], 0.1, "l2", "base"),
        ([1.0, math.nan], [0.1, 0.2], 0.1, "l2", "base"),
        ([1.0, 1.0], [0.1, math.nan], 0.1, "l2", "diverged"),
        ([1.0, 1.0], [0.1, math.inf], 0.1, "l2_sum_zero", "diverged"),
        ([1.0, 1.0], [0.1, 0.2], -0.1, "l2", "epsilon"),
        ([1.0, 1.0], [0.1, 0.2], math.nan, "l2", "epsilon"),
    ],
)
def test_worst_case_refuses(base, loss, epsilon, ball, message):
    with pytest.raises(ValueError, match=message):
        worst_case_weights(torch.tensor(base), torch.tensor(loss), epsilon, ball)


def test_sampled_worst_case_golden():
    case = GOLDEN["rkd_loss"]
    draws = double(case["weight_vectors"])
    for expected in (case["expected_T1"], case["expected_T4_scale_T2"]):
        loss = double(expected["per_class_loss"])
        torch.testing.assert_close(draws @ loss, double(expected["losses"]), rtol=1e-9, atol=0)
        assert torch.equal(sampled_worst_case(draws, loss), draws[expected["chosen"]])


def test_sampled_worst_case_takes_the_first_of_equals():
    draws = double([[1, 1], [1, 3], [3, 1], [1, 3]])
    assert sampled_worst_case(draws, double([1, 1])).tolist() == [1, 3]
    assert sampled_worst_case(draws, torch.zeros(2)).tolist() == [1, 1]


def test_sampled_worst_case_refuses():
    for draws, loss in (([[1.0, 1.0]], [1.0]), ([1.0], [1.0]), ([[]], [[]])):
        with pytest.raises(ValueError, match=r"\[M, K\]"):
            sampled_worst_case(torch.tensor(draws), torch.tensor(loss))
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        sampled_worst_case(torch.empty(0, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        sampled_worst_case(torch.ones(1, 1), torch.tensor([math.nan]))
