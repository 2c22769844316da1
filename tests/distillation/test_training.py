"""The training loop of the student, in one process; groups are in test_train_group.py and test_pipeline.py."""

from __future__ import annotations

import io
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pukd_ray.config import DistillConfig, RunConfig, SourceConfig, StudentConfig, TeacherConfig
from pukd_ray.corpus.pixels import PixelSpec
from pukd_ray.distillation import training
from pukd_ray.distillation.data import Batch, InMemory, Streamed, decode_all
from pukd_ray.distillation.training import Distillation, distil, label_loss, lr_factor, measure_classes, view
from pukd_ray.networks.teacher import Normalise, dump_state, new_network
from pukd_ray.runtime import devices
from pukd_ray.runtime.devices import ALONE, Worker

TEACHER = TeacherConfig(arch="lenet5", weights="w", num_classes=3, input_size=28, channels=1, mean=[0.5], std=[0.3])
SOURCE = SourceConfig(uri="x")


pytestmark = pytest.mark.usefixtures("one_thread")


def stripes(count: int, seed: int = 0) -> Batch:
    """Images of which one of three horizontal thirds is bright; every fourth is P."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = rng.integers(0, 90, (count, 1, 28, 28), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 9 * label : 9 * label + 9] += 120
    known = np.where(np.arange(count) % 4 == 0, labels, -1)
    return Batch(torch.from_numpy(pixels), torch.from_numpy(known), torch.from_numpy(rng.random(count)).float())


class Bright(nn.Module):
    """A teacher that knows: logits by the brightness of each third, float or uint8 pixels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        thirds = [pixels[:, 0, 9 * k : 9 * k + 9].float().mean((1, 2)) for k in range(3)]
        return torch.stack(thirds, 1) / 20


def distillation(examples: Batch, worker: Worker = ALONE, steps: int = 40, **settings: Any) -> Distillation:
    chosen = {"batch_size": 32, "lr": 0.01, "augment": "none", **settings}
    config = RunConfig(
        teacher=TEACHER, positives=SOURCE, corpus=SOURCE, student=StudentConfig(arch="lenet5_half"),
        distill=DistillConfig(**chosen),
    )  # fmt: skip
    images = InMemory(examples, config.distill.batch_size, config.seed, worker)
    weights = torch.ones(3, dtype=torch.float64)
    return Distillation(config, images, Bright(), Normalise(TEACHER), weights, steps, worker)


DRAWN: list[float] = []
"""What networks of `drawing` drew, one number a step."""


class Drops(nn.Dropout):
    """Dropout that says what it drew."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            DRAWN.append(float(torch.rand(())))
        return super().forward(features)


def drawing(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    size = channels * input_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.ReLU(), Drops(), nn.Linear(32, num_classes))


def student_of(state: dict[str, torch.Tensor]) -> Any:
    network = new_network("lenet5_half", TEACHER)
    network.load_state_dict(state)
    return network.eval()


def accuracy(state: dict[str, torch.Tensor], seed: int = 9) -> float:
    test = stripes(300, seed).pixels
    with torch.inference_mode():
        return float((student_of(state)(Normalise(TEACHER)(test)).argmax(1) == Bright()(test).argmax(1)).float().mean())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixup": 0.4},
        {"sample_weights": "pu_probability", "label_weight": 0.2, "temperature": 4.0, "lr": 0.01},
        {"ema": 0.99, "schedule": "step"},
        {"adversary": "draws", "augment": "crop"},
    ],
    ids=str,
)
def test_the_student_learns_what_the_teacher_knows(settings: dict[str, Any]) -> None:
    history, students = distil(distillation(stripes(400), steps=150, **settings))
    assert accuracy(students[""]) > 0.95
    assert history[-1][0] == 150
    assert history[-1][1] < 0.5 * history[0][1]
    assert set(students) == ({"", "_last"} if "ema" in settings else {""})


def test_class_sums_are_those_of_what_a_student_sees() -> None:
    """P, of which it sees more than there is, counts by its share of the batches."""
    pixels = torch.zeros(100, 1, 28, 28, dtype=torch.uint8)
    pixels[:10, :, :9], pixels[10:, :, 9:18] = 200, 200
    examples = Batch(pixels, torch.where(torch.arange(100) < 10, 0, -1), torch.ones(100))
    for share, expected in ((None, [10, 90, 0]), (0.5, [50, 50, 0]), (0.25, [25, 75, 0])):
        settings = DistillConfig(batch_size=20, positive_share=share, class_weights="hard")
        images = InMemory(examples, 20, 0, positive_share=share)
        _, sums = measure_classes(Bright(), images, settings, 3, ALONE)
        assert sums.tolist() == pytest.approx(expected)
        seen = torch.cat([Bright()(images.batch(step).pixels).argmax(1) for step in range(100)])
        assert (100 * torch.bincount(seen, minlength=3) / len(seen)).tolist() == pytest.approx(expected)


def test_a_student_begins_with_what_it_is_given() -> None:
    """Of the same classes with all of it, of others with all but the classifier; not where it goes on."""
    run = replace(distillation(stripes(100), steps=2), config=distillation(stripes(100), lr=1e-9).config)
    other = replace(TEACHER, num_classes=5)
    random = distil(run)[1][""]
    for teacher, anew in ((TEACHER, set()), (other, {"fc3.weight", "fc3.bias"})):
        torch.manual_seed(77)
        given = new_network("lenet5_half", teacher).state_dict()
        begun = distil(replace(run, start=dump_state(given)))[1][""]
        for name, value in begun.items():
            torch.testing.assert_close(value, (random if name in anew else given)[name], rtol=0, atol=1e-5)
    whole = distillation(stripes(100), steps=10)
    kept: list[dict[str, Any]] = []
    expected = distil(replace(whole, start=dump_state(random)), on_checkpoint=lambda s: kept.append(deepcopy(s)))
    again = distil(replace(whole, start=dump_state(random)), resume=kept[1])
    assert again[0] == expected[0]
    assert all(torch.equal(value, again[1][""][name]) for name, value in expected[1][""].items())


@pytest.mark.parametrize(
    ("settings", "arch"),
    [({}, "lenet5_half"), ({"ema": 0.9, "mixup": 0.2}, "lenet5_half"), ({}, f"{__name__}:drawing")],
    ids=str,
)
def test_a_resumed_training_ends_where_the_whole_one_does(settings: dict[str, Any], arch: str) -> None:
    run = distillation(stripes(200), steps=10, **settings)
    run = replace(run, config=replace(run.config, student=StudentConfig(arch=arch)))
    kept: list[dict[str, Any]] = []

    def keep(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        kept.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))

    history, whole = distil(run, on_checkpoint=keep)
    assert [state["step"] for state in kept] == [2, 4, 6, 8]
    again, resumed = distil(run, resume=kept[1])
    assert again == history
    for suffix, state in whole.items():
        for name, value in state.items():
            torch.testing.assert_close(resumed[suffix][name], value, rtol=0, atol=0)


def test_every_rank_and_step_draws_its_own() -> None:
    DRAWN.clear()
    for worker in (Worker(0, 1), Worker(1, 1)):
        run = distillation(stripes(200), worker, steps=10)
        distil(replace(run, config=replace(run.config, student=StudentConfig(arch=f"{__name__}:drawing"))))
    assert len(set(DRAWN)) == len(DRAWN) == 20


class Large(nn.Module):
    """A teacher whose hidden layer passes 65,504, where float16 ends, on a white image only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.last = nn.Linear(784, 8, bias=False), nn.Linear(8, 3, bias=False)
        nn.init.constant_(self.hidden.weight, 0.4)
        nn.init.normal_(self.last.weight, std=1e-5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(pixels.float().flatten(1)))


def test_a_teacher_beyond_float16_is_asked_again_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_gpu(_device: Any, _precision: str = "auto", *, learns: bool = False) -> torch.dtype:
        return torch.bfloat16 if learns else torch.float16

    examples = stripes(64)
    examples.pixels[5] = 255
    run = replace(distillation(examples, steps=3, augment="crop"), teacher=Large())
    whole = measure_classes(run.teacher, run.images, run.config.distill, 3, ALONE)
    for module in (devices, training):
        monkeypatch.setattr(module, "half_type", of_a_gpu)
    with ALONE.autocast(learns=False):
        finite = run.teacher(examples.pixels).isfinite().all(1)
    assert (~finite).nonzero().flatten().tolist() == [5]
    again = measure_classes(run.teacher, run.images, run.config.distill, 3, ALONE)
    torch.testing.assert_close(again, whole, rtol=1e-2, atol=0)
    history, _ = distil(run)
    assert all(np.isfinite(loss) for _, loss in history)


@pytest.mark.parametrize(("settings", "asked"), [({}, 0), ({"augment": "crop"}, 3), ({"mixup": 0.2}, 3)], ids=str)
def test_images_shown_as_they_are_ask_the_teacher_once(settings: dict[str, Any], asked: int) -> None:
    calls = []

    class Counting(Bright):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixels))
            return super().forward(pixels)

    fresh = replace(distillation(stripes(100), steps=3, **settings), teacher=Counting())
    history, expected = distil(fresh)
    assert len(calls) == 3
    measure_classes(fresh.teacher, fresh.images, fresh.config.distill, 3, fresh.worker)
    calls.clear()
    again, students = distil(fresh)
    assert len(calls) == asked
    assert again == history
    torch.testing.assert_close(students[""], expected[""], rtol=0, atol=0)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_views_are_the_same_whatever_the_number_of_ranks(mixup: float) -> None:
    examples = stripes(100)
    whole, shown = view(distillation(examples, mixup=mixup, augment="crop_flip"), 3)
    for rank in range(2):
        part, part_shown = view(distillation(examples, Worker(rank, 2), mixup=mixup, augment="crop_flip"), 3)
        torch.testing.assert_close(part, whole[rank::2])
        for (share, batch), (part_share, part_batch) in zip(shown, part_shown, strict=True):
            torch.testing.assert_close(part_share, share[rank::2])
            assert part_batch.labels.tolist() == batch.labels[rank::2].tolist()


def test_mixup_mixes_images_by_their_shares() -> None:
    pixels, [(share, one), (rest, other)] = view(distillation(stripes(100), mixup=0.5), 0)
    each = share[:, None, None, None]
    torch.testing.assert_close(pixels, each * one.pixels + (1 - each) * other.pixels)
    torch.testing.assert_close(share + rest, torch.ones(32))
    assert share.min() < 0.2 < 0.8 < share.max()
    assert (one.pixels != other.pixels).any()


def test_only_labels_of_p_count_and_by_their_share() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0]])
    nothing = torch.zeros(3, 1, 1, 1)
    one = Batch(nothing, torch.tensor([1, -1, 2]), torch.ones(3))
    other = Batch(nothing, torch.tensor([-1, -1, 0]), torch.ones(3))
    each = -F.log_softmax(logits, 1)
    alone = label_loss(logits, [(torch.ones(3), one)])
    assert float(alone) == pytest.approx(float(each[0, 1] + each[2, 2]))
    mixed = label_loss(logits, [(torch.full((3,), 0.7), one), (torch.full((3,), 0.3), other)])
    assert float(mixed) == pytest.approx(float(0.7 * (each[0, 1] + each[2, 2]) + 0.3 * each[2, 0]))


def test_labels_correct_a_wrong_teacher() -> None:
    class Wrong(Bright):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels).roll(1, 1)

    examples = replace(stripes(400), labels=Bright()(stripes(400).pixels).argmax(1))
    found = {}
    for weight in (0.0, 10.0):
        run = replace(distillation(examples, steps=150, label_weight=weight), teacher=Wrong())
        found[weight] = accuracy(distil(run)[1][""])
    assert found[0.0] < 0.1 < 0.9 < found[10.0]


def test_images_that_are_surely_irrelevant_teach_nothing() -> None:
    """Half of the images, of weight 0, get nonsense from the teacher."""

    class Torn(Bright):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = super().forward(pixels)
            return torch.where((pixels[:, 0, 27, 27] == 255)[:, None], logits.roll(1, 1), logits)

    examples = stripes(400)
    strange = torch.arange(400) % 2 == 0
    examples.pixels[strange, 0, 27, 27] = 255
    examples = replace(examples, weights=(~strange).float())
    found = {}
    for kind in ("pu_probability", "none"):
        run = replace(distillation(examples, steps=150, sample_weights=kind), teacher=Torn())
        found[kind] = accuracy(distil(run)[1][""])
    assert found["pu_probability"] > 0.95
    assert found["none"] < found["pu_probability"] - 0.1


def test_the_average_forgets_the_random_start() -> None:
    _, students = distil(distillation(stripes(200), steps=60, ema=0.999, lr=0.02))
    torch.manual_seed(0)  # the config's
    start = new_network("lenet5_half", TEACHER).state_dict()
    name = next(iter(start))
    travelled = (students["_last"][name] - start[name]).norm()
    assert (students[""][name] - students["_last"][name]).norm() < 0.5 * travelled
    assert (students[""][name] - students["_last"][name]).norm() > 0


# -- images -----------------------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (28, 28), value).save(file, "PNG")
    return file.getvalue()


def test_what_is_known_of_an_image_stays_with_it() -> None:
    images = [png(10), b"broken", png(30), None, png(50)]
    batch = decode_all(images, PixelSpec(28, 1, "crop"), [0, 1, 2, 3, 4], [0.0, 0.1, 0.2, 0.3, 0.4])
    assert batch.pixels[:, 0, 0, 0].tolist() == [10, 30, 50]
    assert batch.labels.tolist() == [0, 2, 4]
    assert batch.weights.tolist() == pytest.approx([0.0, 0.2, 0.4])
    selected = decode_all(images, PixelSpec(28, 1, "crop"))
    assert (selected.labels.tolist(), selected.weights.tolist()) == ([-1] * 3, [1.0] * 3)
    nothing = decode_all([b"broken"], PixelSpec(28, 1, "crop"))
    assert nothing.pixels.shape == (0, 1, 28, 28)
    assert len(Batch.join([batch, nothing, selected])) == 6


class Shard:
    """What Ray gives a worker, of ten images; it keeps how it was asked."""

    def __init__(self) -> None:
        self.shuffles: list[tuple[int | None, int | None]] = []

    def iter_batches(
        self,
        *,
        batch_size: int,
        batch_format: str,
        drop_last: bool,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> Iterator[pa.Table]:
        assert batch_format == "pyarrow"
        self.shuffles.append((local_shuffle_buffer_size, local_shuffle_seed))
        table = pa.table(
            {
                "pixels": [bytes([i] * 784) for i in range(10)],
                "label": list(range(10)),
                "weight": [i / 10 for i in range(10)],
            }
        )
        for start in range(0, 10, batch_size):
            if start + batch_size <= 10 or not drop_last:
                yield table.slice(start, batch_size)


def test_a_streamed_shard_starts_again_at_its_end() -> None:
    shard = Shard()
    images = Streamed(shard, 20, PixelSpec(28, 1, "crop"), 4, 6 * 784, 7)
    batches = [images.batch(step) for step in range(3)]
    assert [b.labels.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert batches[1].pixels[:, 0, 5, 5].tolist() == [4, 5, 6, 7]
    assert batches[1].weights.tolist() == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert images.mixup_partners(1, batches[1]).labels.tolist() == [7, 6, 5, 4]
    assert sum(len(batch) for batch in images.all_batches()) == 10
    # Six images of 784 bytes to draw from, in another order in each pass; none where all are read once.
    assert shard.shuffles == [(6, 7), (6, 9), (None, None)]
    with pytest.raises(RuntimeError, match="smaller than its batch"):
        Streamed(Shard(), 20, PixelSpec(28, 1, "crop"), 16, 1e9, 0).batch(0)


def test_class_weights_by_count_and_their_mean() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    pixels = np.zeros((100, 1, 28, 28), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 9 * label : 9 * label + 9] = 200
    batch = Batch(torch.from_numpy(pixels), torch.full((100,), -1), torch.ones(100))
    images = InMemory(batch, 32, 0)

    def weights(**settings: Any) -> torch.Tensor:
        return measure_classes(Bright(), images, DistillConfig(**settings), 3, ALONE)[0]

    assert weights(class_weights="none").tolist() == [1, 1, 1]
    hard = weights(class_weights="hard")
    assert hard.sum().item() == pytest.approx(3)
    assert (hard[1] / hard[0]).item() == pytest.approx(2, rel=0.01)  # but for the smoothing
    mean = weights(class_weights="hard", normalise="mean_weight")
    torch.testing.assert_close(mean / mean.sum(), hard / hard.sum())
    assert float((mean[labels]).mean()) == pytest.approx(1)
    assert float((hard[labels]).mean()) == pytest.approx(0.6, abs=0.01)


def test_schedules() -> None:
    steps = [lr_factor("step", s, 8) for s in range(8)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert [lr_factor("constant", s, 8) for s in (0, 7)] == [1, 1]
    cosine = [lr_factor("cosine", s, 100) for s in range(100)]
    assert cosine[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine[5] == 1
    assert cosine[5 + 95 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < cosine[99] < 0.001
