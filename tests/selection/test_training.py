"""Training the selector and cross-fitting it, on features and on pixels of small networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pukd_ray.config import SelectorConfig, TeacherConfig
from pukd_ray.networks.selector import SelectorHead
from pukd_ray.networks.teacher import Teacher, dump_state, new_network
from pukd_ray.runtime.devices import Worker
from pukd_ray.selection.crossfit import (
    FOLDS,
    Groups,
    assess_fit,
    checkpoint_steps,
    fit_fold,
    fold_of,
    latest_good,
)
from pukd_ray.selection.recipe import InProcess, fit_and_calibrate
from pukd_ray.selection.training import (
    Callbacks,
    Examples,
    Training,
    Trunk,
    fit_selector,
    log_max_phi,
    logits_of,
    train,
)
from pukd_ray.selection.verdict import given

TRUE = 0.3


pytestmark = pytest.mark.usefixtures("one_thread")


def gaussians(
    seed: int, n_p: int = 120, n_u: int = 1500, views: int = 2, share: float = TRUE
) -> tuple[Examples, np.ndarray]:
    """P around (2, ...) and U of which a share is like P, and U's truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n_u) < share
    u = rng.normal(size=(n_u, 6)) + 2.0 * np.where(truth, 1, -1)[:, None] * np.array([1, 1, 0, 0, 0, 0])
    p = rng.normal(size=(n_p, 1, 6)) + np.array([2.0, 2, 0, 0, 0, 0]) + 0.1 * rng.normal(size=(n_p, views, 6))
    return Examples(p.astype(np.float16), u.astype(np.float16)), truth


TRAINING = Training("nnpu", TRUE, 150, 128, 0.01, 0)


@pytest.mark.parametrize("loss", ["nnpu", "naive", "vpu"])
@pytest.mark.parametrize("batches", ["balanced", "plain"])
def test_every_loss_ranks_relevant_images_first(loss: str, batches: str) -> None:
    examples, truth = gaussians(0)
    network = fit_selector(examples, replace(TRAINING, loss=loss, batches=batches))
    assert average_precision_score(truth, logits_of(network, examples.u)) > 0.97


@pytest.mark.parametrize("loss", ["nnpu", "naive", "vpu"])
def test_plain_batches_may_have_no_positives(loss: str) -> None:
    examples, _ = gaussians(0, n_p=3)
    network = fit_selector(examples, replace(TRAINING, loss=loss, batches="plain", steps=40))
    assert np.isfinite(logits_of(network, examples.u)).all()


def test_nnpu_takes_about_the_prior_and_naive_next_to_nothing() -> None:
    """Why naive is the rival to beat, and not the default."""
    examples, truth = gaussians(0)
    taken = {
        loss: logits_of(fit_selector(examples, replace(TRAINING, loss=loss)), examples.u) > 0
        for loss in ("nnpu", "naive")
    }
    assert taken["nnpu"].mean() == pytest.approx(truth.mean(), abs=0.06)
    half = logits_of(fit_selector(examples, replace(TRAINING, prior=TRUE / 2.5)), examples.u) > 0
    assert half.mean() < 0.5 * TRUE  # docs/method.md, "A wrong prior is not symmetric"


def test_few_relevant_images_do_not_end_in_all_negative() -> None:
    examples, truth = gaussians(0, n_u=4000, share=0.02)
    training = replace(TRAINING, prior=0.02, steps=300, batch_size=256, lr=0.003)
    priors = [training.prior_at(step) for step in (1, 100, 195, 300)]
    assert 0.2 > priors[0] > 0.19 > priors[1] > 0.05 > priors[2] == pytest.approx(0.02) == priors[3]
    found = {
        first: average_precision_score(truth, logits_of(fit_selector(examples, replace(training, first_prior=first)),
                                                         examples.u))
        for first in (0.2, 0.02)
    }  # fmt: skip
    assert found[0.2] > 0.8
    assert found[0.02] < 0.1


def test_fine_tuning_keeps_the_prior_that_the_head_ended_with() -> None:
    training = replace(TRAINING, prior=0.02)
    assert training.finetuning().prior_at(1) == 0.02
    assert replace(training, prior=0.4).prior_at(1) == pytest.approx(0.4)


def test_known_negatives_are_pushed_down_where_u_alone_cannot_tell() -> None:
    """Images beside P that U says nothing of: three quarters of what lies there is relevant, these are not."""
    examples, _ = gaussians(0)
    rng = np.random.default_rng(1)
    beside = (rng.normal(size=(40, 6)) * 0.3 + np.array([1.5, 1.5, 0, 0, 0, 2.0])).astype(np.float16)
    with_known = replace(examples, known=beside, known_shares=np.full(40, 1 / 40))
    mean = {}
    for loss in ("nnpu", "naive"):
        for name, given_ in (("without", examples), ("with", with_known)):
            network = fit_selector(given_, replace(TRAINING, loss=loss))
            mean[loss, name] = float(logits_of(network, beside).mean())
    assert mean["nnpu", "with"] < 0 < mean["nnpu", "without"]
    assert mean["naive", "with"] == mean["naive", "without"]  # to other losses none are given


@pytest.mark.parametrize("known", [False, True])
def test_training_is_the_same_whatever_the_number_of_ranks(known: bool) -> None:
    """Two ranks' inputs, masks and labels are the halves of one rank's."""
    examples, _ = gaussians(1)
    if known:
        examples = replace(examples, known=examples.u[:50] - np.float16(3))
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    class Spy(SelectorHead):
        def forward(self, features: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
            assert kept is not None
            seen.setdefault(self.rank, []).append((features.detach().clone(), kept.clone()))
            return super().forward(features, kept)

    for rank, world in ((0, 1), (0, 2), (1, 2)):
        head = Spy(6)
        head.rank = 10 * world + rank
        train(head, examples, replace(TRAINING, steps=3), worker=Worker(rank, world))
    for (x, kept), (x0, kept0), (x1, kept1) in zip(seen[10], seen[20], seen[21], strict=True):
        for whole, *parts in ((x, x0, x1), (kept, kept0, kept1)):
            n_p = 32
            torch.testing.assert_close(whole[:n_p:2], parts[0][: n_p // 2])
            torch.testing.assert_close(whole[1:n_p:2], parts[1][: n_p // 2])
            torch.testing.assert_close(whole[n_p::2], parts[0][n_p // 2 :])
            assert len(whole) == (160 if known else 128)
            torch.testing.assert_close(whole[129::2], parts[1][64:])
    assert 0.6 < float(torch.cat([k for _, k in seen[10]]).float().mean()) < 0.8


def test_plain_batches_hold_p_as_often_as_it_comes() -> None:
    from pukd_ray.selection.training import _batches

    batch = _batches(100, 900, replace(TRAINING, batches="plain"))
    rows = [batch(step) for step in range(125)]  # 16 passes
    assert {len(p) + len(u) for p, u in rows} == {128}
    assert np.mean([len(p) for p, _ in rows]) == pytest.approx(12.8, abs=0.1)
    assert sorted(set(np.concatenate([u for _, u in rows]))) == list(range(900))


def test_a_stopped_schedule_is_a_part_of_the_whole_one() -> None:
    """The head at a checkpoint is the head of a training that stops there with that horizon."""
    examples, _ = gaussians(2)
    at: dict[int, np.ndarray] = {}
    callbacks = Callbacks((40,), lambda step, network: at.update({step: logits_of(network, examples.u)}))
    fit_selector(examples, replace(TRAINING, steps=80), callbacks=callbacks)
    stopped = fit_selector(examples, replace(TRAINING, steps=40, horizon=80))
    np.testing.assert_allclose(at[40], logits_of(stopped, examples.u), rtol=1e-5, atol=1e-5)


def test_vpu_knows_its_scale_only_from_the_data() -> None:
    examples, _ = gaussians(3)
    training = replace(TRAINING, loss="vpu", steps=20)
    network = fit_selector(examples, training)
    highest = max(logits_of(network, examples.u).max(), logits_of(network, examples.p[:, 0]).max())
    assert log_max_phi(network, examples, training) == pytest.approx(-np.log1p(np.exp(-highest)))
    assert log_max_phi(network, examples, replace(training, loss="nnpu")) == 0.0


# -- cross-fit --------------------------------------------------------------------------------------------------


def test_folds_hold_every_row_once_and_no_row_they_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, _ = gaussians(4)
    trained: list[Examples] = []
    from pukd_ray.selection import crossfit

    original = crossfit.fit_selector

    def spy(features: Examples, *args: object, **kwargs: object) -> object:
        trained.append(features)
        return original(features, *args, **kwargs)

    monkeypatch.setattr(crossfit, "fit_selector", spy)
    folds = [fit_fold(examples, k, replace(TRAINING, steps=10)) for k in range(FOLDS)]
    for name, count in (("p_rows", 120), ("u_rows", 1500)):
        assert sorted(np.concatenate([getattr(f, name) for f in folds])) == list(range(count))
    for fold, features in zip(folds, trained, strict=True):
        held_out = {row.tobytes() for row in examples.p[fold.p_rows].reshape(-1, 6)}
        assert held_out.isdisjoint(row.tobytes() for row in features.p.reshape(-1, 6))
        assert len(features.u) == 1500 - len(fold.u_rows)
    assert folds[0].p_logits.shape == (10, 24)


def one_class(n_p: int, units: np.ndarray) -> Groups:
    return Groups(units, np.zeros(n_p, np.int64), np.zeros(len(units), np.int64))


def test_the_chain_finds_prior_precision_and_recall() -> None:
    examples, truth = gaussians(5, n_p=300, n_u=4000)
    selector = SelectorConfig(steps=200, batch_size=128, lr=0.01)
    fitted = fit_and_calibrate(InProcess(examples, one_class(300, np.arange(4000) // 100)), selector, 0)
    verdict, fit = fitted.verdict, fitted.fit
    assert verdict.has_gap
    assert verdict.trust == "high"
    assert verdict.train >= verdict.prior == pytest.approx(truth.mean(), abs=0.03)
    assert verdict.lower - 0.01 < truth.mean() < verdict.upper + 0.01
    assert verdict.lower < verdict.prior < verdict.upper < verdict.lower + 0.1
    assert fitted.training == replace(fitted.training, steps=fit.steps, horizon=200, prior=verdict.train)
    taken = fit.u_logits > 0
    refits = np.array([refit(fit.u_logits) for refit in fit.bootstrap])
    for figures, true in (
        (refits[:, taken].mean(1), truth[taken].mean()),
        (refits[:, taken].sum(1) / refits.sum(1), truth[taken].sum() / truth.sum()),
    ):
        lower, upper = np.quantile(figures, [0.05, 0.95])
        assert lower - 0.03 < true < upper + 0.03
        assert upper - lower < 0.25


def test_a_given_prior_is_used_as_it_is() -> None:
    examples, _ = gaussians(6)
    training = replace(TRAINING, prior=0.2, steps=40, batch_size=64)
    verdict = given(0.2)
    assert (verdict.lower, verdict.upper, verdict.train, verdict.trust) == (
        0.2,
        0.2,
        0.2,
        "low",
    )  # before anybody looked
    fit = assess_fit(
        [fit_fold(examples, k, training) for k in range(FOLDS)], one_class(120, np.zeros(1500)), verdict, training
    )
    assert fit.calibration(fit.u_logits).mean() == pytest.approx(0.2, abs=0.01)


def test_a_threshold_moves_all_that_was_held_out_alike() -> None:
    examples, _ = gaussians(6)
    training = replace(TRAINING, prior=0.5, steps=40, batch_size=64)
    groups = one_class(120, np.zeros(1500))
    fit = assess_fit([fit_fold(examples, k, training) for k in range(FOLDS)], groups, given(0.3), training)
    moved = fit.taking(0.3)
    assert (moved.u_logits > 0).mean() == pytest.approx(0.3, abs=0.002) == moved.selected_share
    np.testing.assert_allclose(moved.calibration(moved.u_logits), fit.calibration(fit.u_logits), atol=1e-5)
    np.testing.assert_allclose(moved.bootstrap[3](moved.p_logits), fit.bootstrap[3](fit.p_logits), atol=1e-5)
    assert moved.recall == (moved.p_logits > 0).mean() < fit.recall


def test_noise_does_not_end_a_training_early() -> None:
    p = np.r_[np.ones(90), -np.ones(10)]  # recall 0.9 +- 0.03, so that the curve is known to 0.015
    assert latest_good([0.90, 0.95, 0.94, 0.93], p, 0.25) == 2
    assert latest_good([0.90, 0.95, 0.90, 0.89], p, 0.25) == 1
    assert latest_good([0.90, 0.95, 0.95, 0.949], np.ones(100), 0.25) == 2


def test_checkpoints_and_folds() -> None:
    assert checkpoint_steps(2000) == tuple(range(200, 2001, 200))
    assert checkpoint_steps(3) == (1, 2, 3)
    assert np.bincount(fold_of(12, 0)).tolist() == [3, 3, 2, 2, 2]


# -- fine-tuning ------------------------------------------------------------------------------------------------


def pixel_task(arch: str) -> tuple[Examples, Trunk, np.ndarray]:
    """Bright images against dark ones, with noise."""
    teacher = TeacherConfig(arch=arch, weights="w", num_classes=3, input_size=32, channels=1, mean=[0.5], std=[0.3])
    torch.manual_seed(0)
    weights = dump_state(new_network(arch, teacher).state_dict())
    rng = np.random.default_rng(0)
    truth = rng.random(200) < TRUE
    u = (rng.normal(size=(200, 1, 32, 32)) * 40 + np.where(truth, 150, 90)[:, None, None, None]).clip(0, 255)
    p = (rng.normal(size=(40, 1, 1, 32, 32)) * 40 + 150).clip(0, 255)
    pixels = Examples(p.astype(np.uint8), u.astype(np.uint8))
    network = Teacher(teacher, weights, torch.device("cpu"), "auto")
    features = Examples(
        network(pixels.p[:, 0])[0].numpy()[:, None].astype(np.float16), network(pixels.u)[0].half().numpy()
    )
    return features, Trunk(teacher, weights, "auto", pixels), truth


@pytest.mark.parametrize("arch", ["lenet5", "resnet20_cifar"])
def test_finetuning_trains_the_trunk_with_the_teachers_statistics(arch: str) -> None:
    features, trunk, truth = pixel_task(arch)
    training = replace(TRAINING, steps=60, batch_size=32, lr=0.002)
    network = fit_selector(features, training, trunk)
    before = Teacher(trunk.teacher, trunk.weights, torch.device("cpu")).extractor.model.state_dict()
    after = network.extractor.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("conv1" in name for name in changed)
    assert not any("running" in name or "num_batches" in name or name.startswith("fc3") for name in changed)
    assert average_precision_score(truth, logits_of(network, trunk.pixels.u)) > 0.95


def test_folds_of_a_finetuned_trunk_score_pixels() -> None:
    features, trunk, _ = pixel_task("lenet5")
    training = replace(TRAINING, steps=40, batch_size=32)
    held_out = [fit_fold(features, k, training, trunk) for k in range(FOLDS)]
    assert held_out[0].steps == tuple(range(1, 11))  # a quarter of the head's
    fit = assess_fit(held_out, one_class(40, np.zeros(200)), given(TRUE), training)
    assert fit.steps in range(4, 41, 4)  # in steps of the head
    assert replace(training, steps=fit.steps, horizon=training.steps).finetuning().horizon == 10
