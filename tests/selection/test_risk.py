"""The PU risks against golden.json, their published formulas, and faulty input."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pukd_ray.selection.risk import KNOWN, known_risk, naive_risk, nnpu_risk, proxy_accuracy, vpu_risk

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def gradient(objective, *inputs):
    return torch.autograd.grad(objective, inputs)


@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", GOLDEN["nnpu"], ids=lambda case: case["name"])
def test_nnpu_golden(case, dtype, rtol):
    z = torch.tensor(case["logits"], dtype=dtype, requires_grad=True)
    expected = case["expected"]
    value, objective = nnpu_risk(z, torch.tensor(case["y"]), case["prior"], beta=case["beta"], gamma=case["gamma"])
    (grad,) = gradient(objective, z)
    assert value.dtype == objective.dtype == dtype
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected["value"], rel=rtol)
    # The smallest golden gradients, 1e-18, are those of saturated logits: no absolute tolerance in float64.
    torch.testing.assert_close(
        grad,
        torch.tensor(expected["grad"], dtype=dtype),
        rtol=rtol,
        atol=0 if dtype == torch.float64 else 1e-30,
    )
    if expected["branch"] == "normal":
        assert objective.item() == pytest.approx(value.item(), rel=rtol)
    else:
        assert objective.item() == pytest.approx(-case["gamma"] * expected["r_minus"], rel=rtol)


def test_nnpu_golden_covers_both_branches():
    assert {case["expected"]["branch"] for case in GOLDEN["nnpu"]} == {"normal", "negative"}


def test_nnpu_clamps_the_whole_batch_not_its_shards():
    """The golden shards, together and as workers that clamp by themselves would see them."""
    case = GOLDEN["nnpu_data_parallel"]
    z = torch.tensor(list(chain(*case["shard_logits"])), dtype=torch.float64, requires_grad=True)
    y = torch.tensor(list(chain(*case["shard_y"])))
    value, objective = nnpu_risk(z, y, case["prior"], beta=case["beta"], gamma=case["gamma"])
    (grad,) = gradient(objective, z)
    expected = case["expected_global"]
    assert value.item() == pytest.approx(expected["value"], rel=1e-9)
    torch.testing.assert_close(grad, z.new_tensor(expected["grad"]), rtol=1e-9, atol=0)

    sizes = [len(shard) for shard in case["shard_logits"]]
    shards = [nnpu_risk(zs, ys, case["prior"]) for zs, ys in zip(z.split(sizes), y.split(sizes), strict=True)]
    (naive_grad,) = gradient(sum(objective for _, objective in shards) / len(shards), z)
    naive_value = sum(value.item() for value, _ in shards) / len(shards)
    assert naive_value == pytest.approx(case["naive"]["mean_of_shard_values"], rel=1e-9)
    torch.testing.assert_close(naive_grad, z.new_tensor(case["naive"]["averaged_grad"]), rtol=1e-9, atol=0)
    assert not torch.allclose(naive_grad, grad, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_saturated_low_precision_logits_keep_their_gradient(dtype, autocast):
    """At 18 the slope s(z) s(-z) is 1.5e-8; a sigmoid in float32, let alone float16, makes it 0."""
    z = torch.tensor([-18.0, 18.0, 0.5, -0.5], dtype=dtype, requires_grad=True)
    y = torch.tensor([1, -1, 1, -1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value, objective = nnpu_risk(z, y, 0.3)
        naive_value, _ = naive_risk(z, y)
    wide = z.detach().float().requires_grad_()
    expected_value, expected = nnpu_risk(wide, y, 0.3)
    assert value.dtype == objective.dtype == naive_value.dtype == torch.float32
    assert torch.equal(value, expected_value)
    assert torch.equal(objective, expected)
    assert bool((gradient(expected, wide)[0] != 0).all())


@pytest.mark.parametrize("label_dtype", [torch.int8, torch.int64, torch.float32])
def test_labels_of_any_dtype(label_dtype):
    z = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64)
    y = torch.tensor([1, -1, -1])
    assert nnpu_risk(z, y.to(label_dtype), 0.3)[0] == nnpu_risk(z, y, 0.3)[0]


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_priors_at_and_beyond_the_ends_are_refused(prior):
    z, y = torch.zeros(2), torch.tensor([1, -1])
    with pytest.raises(ValueError, match="prior"):
        nnpu_risk(z, y, prior)
    with pytest.raises(ValueError, match="prior"):
        proxy_accuracy(z, z, prior)


RISKS = {
    "nnpu": lambda z, y: nnpu_risk(z, y, 0.3),
    "naive": naive_risk,
    "vpu": lambda z, y: vpu_risk(z, y, torch.zeros(int((y == -1).sum())), 0.5),
}


@pytest.mark.parametrize("risk", RISKS.values(), ids=RISKS.keys())
class TestFaultyInput:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_logits(self, risk, bad):
        with pytest.raises(ValueError, match="finite"):
            risk(torch.tensor([0.0, bad]), torch.tensor([1, -1]))

    @pytest.mark.parametrize("labels", [[1, 0], [1, 2], [True, False], [1.0, -0.5], [1.0, math.nan]])
    def test_labels_other_than_one_and_minus_one(self, risk, labels):
        with pytest.raises(ValueError, match="labels"):
            risk(torch.zeros(2), torch.tensor(labels))

    def test_shapes(self, risk):
        with pytest.raises(ValueError, match=r"\[B\]"):
            risk(torch.zeros(2, 1), torch.tensor([[1], [-1]]))
        with pytest.raises(ValueError, match=r"\[B\]"):
            risk(torch.zeros(2), torch.tensor([1, -1, -1]))


@pytest.mark.parametrize("bad", [{"beta": -0.1}, {"gamma": -1.0}, {"beta": math.nan}])
def test_nnpu_refuses_negative_beta_and_gamma(bad):
    with pytest.raises(ValueError, match="beta and gamma"):
        nnpu_risk(torch.zeros(2), torch.tensor([1, -1]), 0.3, **bad)


def test_known_negatives_add_their_part_whatever_the_split(monkeypatch):
    z = torch.tensor([2.0, -1.0, 0.5, -3.0])
    whole = known_risk(z, 0.25, 4)
    assert float(whole) == pytest.approx(KNOWN * 0.75 * torch.sigmoid(z).mean().item())
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    parts = [known_risk(part, 0.25, 4, group=object()) for part in (z[:3], z[3:])]
    assert float(sum(parts) / 2) == pytest.approx(float(whole))  # as gradients are averaged


def test_naive_is_the_class_balanced_logistic_loss():
    torch.manual_seed(0)
    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = torch.where(torch.rand(50) < 0.2, 1, -1)
    p, u = z[y == 1], z[y == -1]
    expected = 0.5 * F.binary_cross_entropy_with_logits(p, torch.ones_like(p))
    expected = expected + 0.5 * F.binary_cross_entropy_with_logits(u, torch.zeros_like(u))
    value, objective = naive_risk(z, y)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(objective, z), gradient(expected, z), rtol=1e-12, atol=0)
    # A missing set counts as 0.
    assert naive_risk(p, torch.ones(len(p)))[0].item() == pytest.approx(0.5 * F.softplus(-p).mean().item())


def plain_vpu(z, y, mixed, mix, weight):
    """The formula as written, for logits that underflow nowhere."""
    phi_u, phi_p, phi_mixed = z[y == -1].sigmoid(), z[y == 1].sigmoid(), mixed.sigmoid()
    target = mix * phi_u + 1 - mix
    return phi_u.mean().log() - phi_p.log().mean() + weight * ((target.log() - phi_mixed.log()) ** 2).mean()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0, "vector"])
def test_vpu_matches_the_formula_and_its_autograd(mix):
    torch.manual_seed(1)
    y = torch.tensor([-1, 1, -1, -1, 1, -1, -1])
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    mixed = torch.randn(5, dtype=torch.float64, requires_grad=True)
    mix = torch.rand(5, dtype=torch.float64) if mix == "vector" else mix
    value, objective = vpu_risk(z, y, mixed, mix, weight=0.3)
    expected = plain_vpu(z, y, mixed, mix, 0.3)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(objective, z, mixed), gradient(expected, z, mixed), rtol=1e-10, atol=0)


def test_vpu_survives_saturated_logits():
    z = torch.tensor([-200.0, -300.0, 100.0, -250.0], requires_grad=True)
    mixed = torch.tensor([-150.0, 0.0], requires_grad=True)
    value, objective = vpu_risk(z, torch.tensor([-1, -1, 1, 1]), mixed, 1.0)
    # log mean_U phi = -200 - log 2, mean_P log phi = -125, gaps of 50 and 300 - log 2
    expected = -200 - math.log(2) + 125 + 0.3 * (50**2 + (300 - math.log(2)) ** 2) / 2
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert all(bool(g.isfinite().all()) for g in gradient(objective, z, mixed))


def test_vpu_refuses_bad_mixing():
    z, y = torch.zeros(3), torch.tensor([1, -1, -1])
    with pytest.raises(ValueError, match="mixed_logits"):
        vpu_risk(z, y, torch.zeros(3), 0.5)
    for mix in (1.5, -0.1, math.nan, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="mix must"):
            vpu_risk(z, y, torch.zeros(2), mix)
    with pytest.raises(ValueError, match="weight"):
        vpu_risk(z, y, torch.zeros(2), 0.5, weight=-1)
    with pytest.raises(ValueError, match="finite"):
        vpu_risk(z, y, torch.tensor([0.0, math.nan]), 0.5)


def test_proxy_accuracy_golden():
    case = GOLDEN["proxy_accuracy"]
    p, u = torch.tensor(case["p_logits"]), torch.tensor(case["u_logits"])
    assert proxy_accuracy(p, u, case["prior"]) == pytest.approx(case["expected"], rel=1e-9)


def test_proxy_accuracy_refuses_empty_and_non_finite_logits():
    for p, u in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [math.inf])):
        with pytest.raises(ValueError, match="non-empty and finite"):
            proxy_accuracy(torch.tensor(p), torch.tensor(u), 0.3)
