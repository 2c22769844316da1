"""The distillation loss against golden.json; several processes are in test_data_parallel.py."""

import json
import math
from pathlib import Path

import pytest
import torch

from pukd_ray.distillation.loss import ADVERSARIES, kl_divergence, per_class_sums, rkd_objective
from pukd_ray.distillation.weights import worst_case_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["rkd_loss"]
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
# `expected_T4_scale_T` is left out: it documents the factor T of the published code, where ours is T^2.
TEMPERATURES = pytest.mark.parametrize(("temperature", "key"), [(1.0, "expected_T1"), (4.0, "expected_T4_scale_T2")])


def logits(dtype=torch.float64):
    student = torch.tensor(GOLDEN["student_logits"], dtype=dtype, requires_grad=True)
    return student, torch.tensor(GOLDEN["teacher_logits"], dtype=dtype)


def small(rtol, dtype):
    """Tolerances; differences of nearly equal softmax outputs keep only an absolute precision in float32."""
    return {"rtol": rtol, "atol": 0 if dtype == torch.float64 else 1e-7}


@PRECISIONS
@TEMPERATURES
def test_kl_and_class_sums_golden(temperature, key, dtype, rtol):
    student, teacher = logits(dtype)
    expected = GOLDEN[key]
    kl = kl_divergence(student, teacher, temperature)
    assert kl.dtype == dtype
    torch.testing.assert_close(kl.detach(), torch.tensor(expected["kl"], dtype=dtype), **small(rtol, dtype))
    labels = teacher.argmax(1)
    assert labels.tolist() == expected["teacher_argmax"]
    sums = per_class_sums(kl, labels, teacher.shape[1])
    assert sums.dtype == torch.float64
    assert not sums.requires_grad
    per_class = torch.tensor(expected["per_class_loss"], dtype=torch.float64)
    torch.testing.assert_close(sums * temperature**2 / len(kl), per_class, rtol=rtol, atol=0)


@PRECISIONS
@TEMPERATURES
def test_objective_with_draws_golden(temperature, key, dtype, rtol):
    student, teacher = logits(dtype)
    expected = GOLDEN[key]
    draws = torch.tensor(GOLDEN["weight_vectors"], dtype=torch.float64)
    value, objective, weights = rkd_objective(
        student,
        teacher,
        base_weights=draws[0],
        epsilon=0.1,
        adversary="draws",
        temperature=temperature,
        draws=draws,
    )
    (grad,) = torch.autograd.grad(objective, student)
    assert torch.equal(weights, draws[expected["chosen"]])
    assert value.dtype == objective.dtype == dtype
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected["loss"], rel=rtol)
    assert objective.item() == pytest.approx(expected["loss"], rel=rtol)
    expected_grad = torch.tensor(expected["grad_student_logits"], dtype=dtype)
    torch.testing.assert_close(grad, expected_grad, **small(rtol, dtype))


@PRECISIONS
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_objective_with_each_adversary(adversary, dtype, rtol):
    """Golden loss and weights of the closed forms; the gradient is that of the loss at constant weights."""
    case = GOLDEN["closed_form"]
    base = torch.tensor(case["base_weights"], dtype=torch.float64)
    student, teacher = logits(dtype)
    value, objective, weights = rkd_objective(
        student,
        teacher,
        base_weights=base,
        epsilon=case["epsilon"],
        adversary=adversary,
        draws=base[None] if adversary == "draws" else None,
    )
    if adversary in ("none", "draws"):
        expected_weights, expected_loss = base, case["base_loss"]
    else:
        expected_weights = torch.tensor(case[adversary]["weights"], dtype=torch.float64)
        expected_loss = case[adversary]["loss"]
    torch.testing.assert_close(weights, expected_weights, rtol=rtol, atol=0)
    assert value.item() == pytest.approx(expected_loss, rel=rtol)
    held_constant = (weights.to(dtype)[teacher.argmax(1)] * kl_divergence(student, teacher)).mean()
    (grad,) = torch.autograd.grad(objective, student)
    (expected_grad,) = torch.autograd.grad(held_constant, student)
    torch.testing.assert_close(grad, expected_grad, **small(rtol, dtype))


@pytest.mark.parametrize("ball", ["l2", "l2_sum_zero"])
def test_gradient_is_that_of_the_maximum(ball):
    """Danskin: finite differences of the worst-case value, in which the weights move, agree with it."""
    torch.manual_seed(0)
    student, teacher = logits()
    options = {"base_weights": torch.ones(4), "epsilon": 0.5, "adversary": ball, "temperature": 2.0}
    _, objective, _ = rkd_objective(student, teacher, **options)
    (grad,) = torch.autograd.grad(objective, student)
    direction, h = torch.randn_like(student), 1e-6
    above, below = (rkd_objective(student + s * direction, teacher, **options)[0] for s in (h, -h))
    assert ((above - below) / (2 * h)).item() == pytest.approx((grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_logits_are_computed_in_float32(autocast):
    student, teacher = (t.detach().bfloat16() for t in logits())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kl = kl_divergence(student, teacher, 2.0)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, kl_divergence(student.float(), teacher.float(), 2.0))


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits()
    teacher.requires_grad_()
    kl_divergence(student, teacher).sum().backward()
    assert teacher.grad is None


def test_a_perfect_student_keeps_the_base_weights():
    _, teacher = logits()
    base = torch.tensor([0.5, 1.0, 1.0, 1.5])
    student = teacher.clone().requires_grad_()
    value, objective, weights = rkd_objective(student, teacher, base_weights=base, epsilon=0.1, adversary="l2_sum_zero")
    assert value == 0
    assert torch.equal(weights, base.double())
    assert bool((torch.autograd.grad(objective, student)[0].abs() < 1e-15).all())


def test_classes_absent_from_the_batch_have_no_loss():
    student, teacher = (t.detach()[:4] for t in logits())  # all of class 0
    value, _, weights = rkd_objective(
        student, teacher, base_weights=torch.ones(4), epsilon=0.1, adversary="linf_sum_zero"
    )
    loss = torch.tensor([kl_divergence(student, teacher).mean(), 0, 0, 0], dtype=torch.float64)
    assert torch.equal(weights, worst_case_weights(torch.ones(4), loss, 0.1, "linf_sum_zero"))
    assert value.item() == pytest.approx((weights * loss).sum().item())


def test_faulty_input_is_refused():
    student, teacher = logits()
    options = {"base_weights": torch.ones(4), "epsilon": 0.1, "adversary": "l2"}

    def refuses(message, student=student, teacher=teacher, **changed):
        with pytest.raises(ValueError, match=message):
            rkd_objective(student, teacher, **{**options, **changed})

    refuses("adversary must be one of", adversary="l3")
    refuses("needs draws", adversary="draws")
    refuses(r"base_weights must be \[4\]", base_weights=torch.ones(3))
    refuses("epsilon", epsilon=-1.0)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        refuses("temperature", temperature=temperature)
    refuses(r"\[N, K\]", teacher=teacher[:-1])
    refuses(r"\[N, K\]", student=student[0], teacher=teacher[0])
    refuses("empty", student=student[:0], teacher=teacher[:0])
    for adversary in ("l2", "none"):
        refuses("not finite", student=torch.full_like(student, math.nan), adversary=adversary)
        refuses("not finite", teacher=torch.full_like(teacher, math.inf), adversary=adversary)


def test_sample_weights_are_relative_and_zero_takes_an_image_out():
    student, teacher = logits()
    base = torch.ones(teacher.shape[1], dtype=torch.float64)
    options = {"base_weights": base, "epsilon": 0.1, "adversary": "l2_sum_zero"}
    count = len(student)
    first = torch.arange(count) < count // 2
    part, _, part_weights = rkd_objective(student[first], teacher[first], **options)
    whole, _, whole_weights = rkd_objective(student, teacher, sample_weights=first.double() * 3, **options)
    torch.testing.assert_close(whole, part)
    torch.testing.assert_close(whole_weights, part_weights)
    drawn = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    one, two = (rkd_objective(student, teacher, sample_weights=scale * drawn, **options)[0] for scale in (1, 7))
    torch.testing.assert_close(one, two)
    by_hand = (drawn * kl_divergence(student, teacher)).sum() / drawn.sum()
    plain, _, _ = rkd_objective(student, teacher, base_weights=base, epsilon=0, adversary="none", sample_weights=drawn)
    torch.testing.assert_close(plain, by_hand)
    with pytest.raises(ValueError, match="sample_weights must be"):
        rkd_objective(student, teacher, sample_weights=drawn[:2], **options)
    with pytest.raises(ValueError, match="global batch is empty"):
        rkd_objective(student, teacher, sample_weights=torch.zeros(count), **options)
