"""The registry of losses: whole, and the only place that knows their names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import pukd_ray
from pukd_ray.config import SelectorConfig
from pukd_ray.selection.losses import LOSSES, MIXUP, Batch
from pukd_ray.selection.risk import vpu_risk

PACKAGE = Path(pukd_ray.__path__[0])
MAY_NAME = {"config.py", "selection/losses.py"}


def test_the_config_offers_just_these_losses() -> None:
    assert set(get_args(get_type_hints(SelectorConfig)["loss"])) == set(LOSSES)
    assert all(loss.name == name for name, loss in LOSSES.items())


def compared_names(source: str) -> set[str]:
    """Names of losses in comparisons and match patterns."""
    tests = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare | ast.match_case)]
    parts = [part for test in tests for part in ast.walk(test.pattern if isinstance(test, ast.match_case) else test)]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)} & set(
        LOSSES
    )


@pytest.mark.parametrize("source", ["a.loss != 'nnpu'", "a in ('vpu', 1)", "match a:\n    case 'naive': pass"])
def test_comparisons_are_found(source: str) -> None:
    assert compared_names(source)
    assert not compared_names("Training('naive', {'nnpu': 'vpu'}) if a == 'x' else 'vpu'")


def test_nothing_else_compares_names_of_losses() -> None:
    files = {str(file.relative_to(PACKAGE)): compared_names(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert files.keys() > MAY_NAME
    assert {file for file, names in files.items() if names and file not in MAY_NAME} == set()


def batch(forward: object, n_p: int = 2, n_u: int = 3) -> Batch:
    inputs = torch.arange(n_p + n_u, dtype=torch.float32)[:, None]
    labels = torch.tensor([1.0] * n_p + [-1.0] * n_u)
    kept = torch.arange(n_p + n_u)[:, None] % 2 == 0
    return Batch(forward, inputs, kept, labels, n_p, 0.3, np.random.default_rng(5), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_one_forward_pass_and_gives_a_gradient(name: str) -> None:
    weight = torch.ones(1, requires_grad=True)
    calls: list[int] = []

    def forward(inputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        assert len(inputs) == len(kept)
        calls.append(len(inputs))
        return (inputs * weight).squeeze(1)

    value, objective = LOSSES[name].risk(batch(forward))
    objective.backward()
    assert len(calls) == 1
    assert value.isfinite()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


def test_vpu_mixes_each_of_u_with_a_positive_and_keeps_its_mask() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(inputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        seen.append((inputs, kept))
        return 0.1 * inputs.squeeze(1)

    given = batch(forward)
    value, _ = LOSSES["vpu"].risk(given)
    mix = np.random.default_rng(5).beta(MIXUP, MIXUP)
    ((inputs, kept),) = seen
    partners = torch.tensor([0.0, 1.0, 0.0])  # P in turn
    mixed = mix * torch.tensor([2.0, 3.0, 4.0]) + (1 - mix) * partners
    torch.testing.assert_close(inputs.squeeze(1), torch.cat([torch.arange(5.0), mixed]))
    assert kept.squeeze(1).tolist() == [True, False, True, False, True, True, False, True]
    expected, _ = vpu_risk(0.1 * torch.arange(5.0), given.labels, 0.1 * mixed, mix)
    torch.testing.assert_close(value, expected)


def test_draws_step_by_step_are_those_of_one_draw() -> None:
    """So that a VPU training is the one it was when all were drawn at once."""
    rng = np.random.default_rng([0, 2])
    assert [rng.beta(0.3, 0.3) for _ in range(500)] == np.random.default_rng([0, 2]).beta(0.3, 0.3, 500).tolist()
