"""Training a teacher on labelled images, in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pukd_ray.config import SourceConfig, TeacherConfig, TeacherTrainingConfig
from pukd_ray.distillation import supervised
from pukd_ray.distillation.data import Batch
from pukd_ray.distillation.supervised import fit_classifier, top1
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import dump_state, load_state, new_network
from pukd_ray.runtime.devices import ALONE

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = TeacherConfig(
    arch="lenet5_half", weights="w", num_classes=3, input_size=28, channels=1, mean=[0.5], std=[0.3]
)
CONFIG = TeacherTrainingConfig(
    teacher=TEACHER, train=SourceConfig(uri="x"), epochs=4, batch_size=32, lr=0.02, augment="crop"
)


def thirds(count: int, seed: int) -> Batch:
    """Images of which one of three horizontal thirds is bright: which, is the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = rng.integers(0, 90, (count, 1, 28, 28), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 9 * label : 9 * label + 9] += 120
    return Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.ones(count))


def test_a_teacher_learns_what_it_is_shown() -> None:
    told: list[tuple[int, int, float]] = []
    network = fit_classifier(CONFIG, thirds(500, 0), ALONE, lambda *step: told.append(step))
    assert top1(network, TEACHER, thirds(600, 1), ALONE) > 0.95
    assert [step[:2] for step in told] == [(1, 60), (21, 60), (41, 60), (60, 60)]
    assert told[-1][2] < 0.3 * told[0][2]
    again = fit_classifier(CONFIG, thirds(500, 0), ALONE, lambda *_: None)
    assert dump_state(again.state_dict()) == dump_state(network.state_dict())


def test_averaged_epochs_go_on_from_given_weights() -> None:
    def fit(start: bytes | None = None, **changes: Any) -> bytes:
        network = fit_classifier(replace(CONFIG, **changes), thirds(500, 0), ALONE, lambda *_: None, start)
        return dump_state(network.state_dict())

    trained = fit()
    # The mean of one step is that step; of more it is none of them, and of a rate near nothing it stays where it began.
    one = fit(trained, epochs=0, swa_epochs=1, batch_size=500, swa_lr=0.01)
    assert one == fit(trained, epochs=1, swa_epochs=0, batch_size=500, lr=0.01)
    assert one not in (trained, fit(trained, epochs=0, swa_epochs=2, batch_size=500, swa_lr=0.01))
    still, before = (load_state(s) for s in (fit(trained, epochs=0, swa_epochs=2, swa_lr=1e-9), trained))
    assert all(torch.allclose(still[k], before[k], atol=1e-6) for k in before)
    # After epochs of its own it begins where these end.
    after = load_state(fit(swa_epochs=2, swa_lr=1e-9))
    assert all(torch.allclose(after[k], before[k], atol=1e-6) for k in before)


def test_averages_are_means_of_all_steps() -> None:
    average, steps = torch.zeros(2), torch.zeros((), dtype=torch.int64)
    for n, value in enumerate([1.0, 2.0, 3.0, 6.0]):
        supervised._mean([average, steps], [torch.full((2,), value), torch.tensor(n)], n)
    assert average.tolist() == [3.0, 3.0]
    assert steps == 3


def test_a_training_that_fails_says_so() -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) after .* steps: lower lr, 50 now"):
        fit_classifier(replace(CONFIG, lr=50.0), thirds(500, 0), ALONE, lambda *_: None)
    averaged = replace(CONFIG, epochs=1, swa_epochs=4, swa_lr=50.0)
    with pytest.raises(RunError, match=r"steps: lower swa_lr, 50 now"):
        fit_classifier(averaged, thirds(500, 0), ALONE, lambda *_: None)


def test_networks_with_switches_among_their_buffers_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    network = new_network(TEACHER.arch, TEACHER)
    network.register_buffer("seen", torch.tensor(True))
    monkeypatch.setattr(supervised, "begun_network", lambda *_: network)
    averaged = fit_classifier(replace(CONFIG, epochs=0, swa_epochs=1), thirds(500, 0), ALONE, lambda *_: None)
    assert averaged.state_dict()["seen"].dtype == torch.bool


def test_accuracy_counts_every_image_once() -> None:
    class Says(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(images), 3)

    labels = torch.tensor([1] * 700 + [0] * 300)
    images = Batch(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8), labels, torch.ones(1000))
    assert top1(Says(), TEACHER, images, ALONE) == pytest.approx(0.7)
