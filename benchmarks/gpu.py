"""What one accelerator does with this project's own modules: scoring, distillation, the selector's fits; and whether
its fast arithmetic agrees with float64.

    python benchmarks/gpu.py --output gpu.json            # about 4 minutes on one GPU
    python benchmarks/gpu.py --quick                      # seconds on a CPU: does every line run?

Needs no cluster and no network: random weights, images made here. Sections (`--sections a,b,c,d,e`):
a. scoring: decode, transfer, forward and post-processing against the forward pass alone on resident data, by
   arithmetic; how many vCPUs feed one accelerator; decoding on the accelerator beside it.
b. robust distillation ResNet-34 -> ResNet-18 at 32 pixels against the same step on resident random data.
c. the selector's fits on 200,000 x 4,096 features against the CPU, whose long trainings are extrapolated.
d. agreement of each arithmetic with float64: ranks, decisions, labels.
e. what torch.compile would bring to the forward pass, and what it costs at the start.
Every figure is printed as it is measured, the table comes last; a fault in one part does not cost the others.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import multiprocessing as mp
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed

from pukd_ray.config import (
    DistillConfig,
    RunConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from pukd_ray.corpus.pixels import PixelSpec, decode_batch, encode_png, pixel_spec

SOURCE = SourceConfig(uri="none")


@dataclass
class Results:
    """Rows of the table: what, value, unit; printed as they come."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str) -> float:
        """Note and print a figure."""
        self.rows.append({"name": name, "value": float(value), "unit": unit})
        print(f"{name:<78} {value:>14,.4g} {unit}", flush=True)
        return float(value)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose fault is printed and noted; the rest goes on."""
        began = time.perf_counter()
        print(f"-- {name}", flush=True)
        try:
            yield
        except Exception as error:  # anything: nobody tried this hardware before
            traceback.print_exc(file=sys.stdout)
            self.rows.append({"name": name, "error": f"{type(error).__name__}: {error}"})
        print(f"-- {name}: {time.perf_counter() - began:.1f} s", flush=True)


@dataclass(frozen=True)
class Setting:
    """Sizes, for the accelerator or for a quick trial."""

    device: Any
    quick: bool
    seconds: float
    """Of a measurement, at least."""
    cpus: int
    precisions: tuple[str, ...]
    """Arithmetic to try the forward pass in."""

    def sync(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type != "cpu":
            torch.cuda.synchronize()

    def rate(self, work: Callable[[], int]) -> float:
        """Items per second of `work`, which returns how many it did; warmed up, repeated for `seconds`."""
        work()
        self.sync()
        done, began = 0, time.perf_counter()
        while True:
            done += work()
            self.sync()
            took = time.perf_counter() - began
            if took >= self.seconds:
                return done / took


def teacher_config(arch: str, size: int, classes: int) -> TeacherConfig:
    """A teacher of that network."""
    return TeacherConfig(
        arch=arch, weights="none", num_classes=classes, input_size=size, mean=[0.49, 0.48, 0.45], std=[0.2, 0.2, 0.2]
    )


def random_weights(config: TeacherConfig, device: Any, passes: int = 20) -> bytes:
    """Random weights whose batch statistics fit: else activations grow from block to block."""
    import torch

    from pukd_ray.networks.teacher import Normalise, dump_state, new_network

    torch.manual_seed(0)
    network = new_network(config.arch, config).to(device).train()
    images = torch.randint(0, 256, (passes, 3, config.input_size, config.input_size), dtype=torch.uint8, device=device)
    with torch.no_grad():
        for _ in range(passes):
            network(Normalise(config).to(device)(images))
    return dump_state(network.state_dict())


def random_head(channels: int) -> bytes:
    """state_dict of a selector that was not trained."""
    import torch

    from pukd_ray.networks.selector import SelectorHead
    from pukd_ray.networks.teacher import dump_state

    state = SelectorHead(channels).state_dict()
    return dump_state({**state, "log_max_phi": torch.tensor(0.0, dtype=torch.float64)})


def photos(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 pixels, about 40 kB each: blurred noise, so that they compress as photos do."""
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)).filter(
            ImageFilter.GaussianBlur(1.2)
        )
        sink = io.BytesIO()
        Image.blend(coarse, grain, 0.35).save(sink, "JPEG", quality=88)
        found.append(sink.getvalue())
    return found


def small_pngs(count: int) -> list[bytes]:
    """PNGs of 32 x 32 pixels, flat patches with a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    return [encode_png(image) for image in coarse ^ rng.integers(0, 8, coarse.shape, dtype=np.uint8)]


# -- a: scoring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Here:
    """Stands for an object in a store: it is here."""

    value: Any

    def get(self) -> Any:
        """The value."""
        return self.value


SLOTS: list[mmap.mmap] = []
"""Memory that the decoding processes, forked later, share with this one: what an object store is to a node."""


def slot_view(slot: int, rows: int, spec: PixelSpec) -> np.ndarray:
    """uint8 [rows, C, H, W] in a slot."""
    return np.frombuffer(SLOTS[slot], np.uint8, rows * int(np.prod(spec.shape))).reshape(rows, *spec.shape)


def decode_into(slot: int, start: int, images: list[bytes], rows: int, spec: PixelSpec) -> float:
    """Decode rows of a slot, from `start` on, as a read task does; CPU seconds that it took."""
    began = time.process_time()
    arrays, errors = decode_batch(images, spec)
    assert not any(errors), errors
    target = slot_view(slot, rows, spec)
    for i, array in enumerate(arrays):
        target[start + i] = array
    return time.process_time() - began


def decoded_table(images: list[bytes], pixels: np.ndarray) -> pa.Table:
    """Rows as they reach an actor, over `pixels` without a copy."""
    from pukd_ray.corpus.reading import to_table
    from pukd_ray.corpus.rows import ImageRow

    table = to_table([ImageRow(f"part-0.parquet#{i}", "part-0.parquet", i, image) for i, image in enumerate(images)])
    for name, value in (("unit", "0"), ("role", "corpus")):
        table = table.append_column(name, pa.array([value] * len(images)))
    offsets = pa.py_buffer((np.arange(len(images) + 1) * pixels[0].nbytes).astype(np.int32))
    column = pa.Array.from_buffers(pa.binary(), len(images), [None, offsets, pa.py_buffer(pixels.reshape(-1))])
    return table.append_column("pixels", column)


def scoring_actor(config: TeacherConfig, weights: bytes, precision: str, device: Any, *, blended: bool = False) -> Any:
    """The product's actor, on a device that nobody assigned; `blended`: its logit with nearness to P."""
    import pukd_ray.networks.actor as actor
    from pukd_ray.networks.teacher import Teacher
    from pukd_ray.selection.blend import Blend, fit_nearness
    from pukd_ray.selection.calibration import Calibration
    from pukd_ray.selection.scoring import ScoreImages

    actor.assigned_device = lambda: device
    extractor = Teacher(config, weights, device, "auto", precision).extractor  # type: ignore[arg-type]
    blend = None
    if blended:
        rng, width = np.random.default_rng(0), extractor.last_tap[0]
        p, u = (rng.normal(size=(count, width)).astype(np.float32) for count in (1000, 4000))
        labels = np.arange(len(p)) % 10
        blend = Blend((1.0, 0.5, 0.2), 1.0), Here(fit_nearness(p, u, labels, labels % 2, 0)[0].dump())
    head, calibration = random_head(extractor.channels), Calibration(1.0, 0.0)
    return ScoreImages(config, Here(weights), "auto", precision, head, None, calibration, "likely", 0.9, {}, blend)  # type: ignore[arg-type]


def section_a(results: Results, setting: Setting, pools: dict[str, Any]) -> None:
    """Scoring."""
    cases = [("resnet34_cifar", 32, 10, small_pngs(256)), ("resnet50", 224, 1000, photos(8 if setting.quick else 48))]
    for arch, size, classes, encoded in cases:
        label = f"a {arch}@{size}"
        config = teacher_config(arch, size, classes)
        weights = random_weights(config, setting.device, 2 if setting.quick else 20)
        with results.part(f"{label}: forward only, by arithmetic"):
            best = forward_only(results, setting, label, config, weights)
        with results.part(f"{label}: score modules"):
            score_modules(results, setting, label, config, weights, encoded, best, pools["decode"])
    with results.part("a: decoding on the accelerator"):
        decode_on_device(results, setting, photos(8 if setting.quick else 48))


def forward_only(
    results: Results, setting: Setting, label: str, config: TeacherConfig, weights: bytes
) -> dict[str, float]:
    """Images/s of what the actor computes on pixels that are on the device already."""
    import torch

    found: dict[str, float] = {}
    for name in setting.precisions:
        actor = scoring_actor(config, weights, "float32" if name == "tf32" else name, setting.device)
        if name == "tf32":
            torch.backends.cudnn.allow_tf32 = True
        shape = (config.channels, config.input_size, config.input_size)
        fits = 8 if config.input_size < 64 else 1
        if setting.device.type != "cpu":
            actor.run(np.zeros((64, *shape), np.uint8))
            fits = actor.run.batch_rows
            results.add(f"{label} {name}: rows per batch, by memory", fits, "rows")
        for rows in sorted({fits, 256} if not setting.quick else {fits}):
            pixels = torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, device=setting.device)

            def work(pixels: Any = pixels, rows: int = rows, actor: Any = actor) -> int:
                with torch.inference_mode():
                    for _ in range(4):
                        actor.columns(pixels)
                return 4 * rows

            rate = results.add(f"{label} {name}: forward only, {rows} rows", setting.rate(work), "images/s")
            found[name] = max(found.get(name, 0.0), rate)
        del actor
        if setting.device.type != "cpu":
            torch.cuda.empty_cache()
    return found


def section_e(results: Results, setting: Setting, _: dict[str, Any]) -> None:
    """Compiling."""
    for arch, size, classes in (("resnet34_cifar", 32, 10), ("resnet50", 224, 1000)):
        with results.part(f"e {arch}@{size}"):
            config = teacher_config(arch, size, classes)
            compiled_forward(results, setting, f"e {arch}@{size}", config, random_weights(config, setting.device, 2))


def compiled_forward(results: Results, setting: Setting, label: str, config: TeacherConfig, weights: bytes) -> None:
    """The network alone, without its taps, as it is and compiled."""
    import torch

    from pukd_ray.networks.teacher import load_network
    from pukd_ray.runtime.devices import autocast, set_up

    if setting.quick:
        return
    set_up(setting.device)
    network = load_network(config.arch, config, weights, setting.device, what="benchmark")
    rows = 1024 if config.input_size < 64 else 256
    images = torch.rand(rows, 3, config.input_size, config.input_size, device=setting.device)
    for name, model in (("eager", network), ("compiled", torch.compile(network, dynamic=False))):
        began = time.perf_counter()

        def work(model: Any = model) -> int:
            with torch.no_grad(), autocast(setting.device):
                for _ in range(4):
                    model(images)
            return 4 * rows

        work()
        setting.sync()
        results.add(f"{label} {name}: first call", time.perf_counter() - began, "s")
        results.add(f"{label} {name}: network alone, {rows} rows", setting.rate(work), "images/s")


def score_modules(
    results: Results,
    setting: Setting,
    label: str,
    config: TeacherConfig,
    weights: bytes,
    encoded: list[bytes],
    best: dict[str, float],
    pool: Any,
) -> None:
    """The actor on tables that are decoded, decoding, and both together."""
    from pukd_ray.runtime.devices import rows_per_call

    spec = pixel_spec(config)
    rows = (
        (16 if config.input_size < 64 else 4)
        if setting.quick
        else rows_per_call(setting.device.type != "cpu", int(np.prod(spec.shape)))
    )
    forward = best.get("float16", best.get("float32", 0.0))  # `auto`; on a CPU float32
    images = (encoded * (rows // len(encoded) + 1))[:rows]

    few = images[: max(16, len(encoded))]
    per_core = results.add(
        f"{label}: decoding, one core", len(few) / pool.apply(decode_into, (0, 0, few, len(few), spec)), "images/s"
    )
    results.add(f"{label}: vCPUs that feed one device at its forward rate", forward / per_core, "vCPUs")

    # Transfer, forward and post-processing: tables that are decoded already, as another process left them.
    decode_slot(pool, 0, images, spec, setting.cpus)
    table = decoded_table(images, slot_view(0, rows, spec))
    for blended, threads in ((False, 1), (False, 2), (True, 2)):
        what = f"{threads} thread{'s' * (threads > 1)}{', blended' * blended}"
        actor = scoring_actor(config, weights, "auto", setting.device, blended=blended)
        with ThreadPoolExecutor(threads) as workers:

            def work(workers: Any = workers, threads: int = threads, actor: Any = actor) -> int:
                return sum(out.num_rows for out in workers.map(actor.work, [table] * 2 * threads))

            rate = results.add(f"{label}: actor on decoded tables, {what}", setting.rate(work), "images/s")
        if forward:
            results.add(f"{label}: of forward only, {what}", rate / forward, "")

    # All of it: every core decodes, the actor takes what is ready.
    rate = fed_by_pool(setting, actor, images, spec, pool)
    results.add(f"{label}: decode + score, {setting.cpus} processes decode", rate, "images/s")
    if forward:
        results.add(f"{label}: decode + score, of forward only", rate / forward, "")


def decode_slot(pool: Any, slot: int, images: list[bytes], spec: PixelSpec, processes: int) -> None:
    """Decode all images into a slot, by all processes together."""
    each = -(-len(images) // processes)
    starts = range(0, len(images), each)
    pool.starmap(decode_into, [(slot, k, images[k : k + each], len(images), spec) for k in starts], 1)


def fed_by_pool(setting: Setting, actor: Any, images: list[bytes], spec: PixelSpec, pool: Any) -> float:
    """Images/s of an actor that two threads call on what `pool` decodes, slot by slot."""
    tables = [decoded_table(images, slot_view(i, len(images), spec)) for i in range(len(SLOTS))]
    # Two slots at a time are decoded, by all processes each, and two scored: else all end at once, again and again.
    decodes, calls, ends = threading.Semaphore(2), threading.Semaphore(2), []
    stop = time.perf_counter() + 2 * setting.seconds + 2

    def turn(slot: int) -> None:
        while time.perf_counter() < stop:
            with decodes:
                decode_slot(pool, slot, images, spec, setting.cpus)
            with calls:
                actor.work(tables[slot])
            ends.append(time.perf_counter())

    with ThreadPoolExecutor(len(SLOTS)) as workers:
        list(workers.map(turn, range(len(SLOTS))))
    warm = min(3, len(ends) - 2)
    return (len(ends) - 1 - warm) * len(images) / (ends[-1] - ends[warm])


def decode_on_device(results: Results, setting: Setting, encoded: list[bytes]) -> None:
    """torchvision's nvJPEG, and the same with the resizing to 224 pixels; TorchCodec reads no single JPEGs."""
    import torch
    from torchvision.io import decode_jpeg

    images = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]

    def decode() -> list[Any]:
        found = decode_jpeg(images, device=setting.device)
        return found if isinstance(found, list) else [found]

    def resized() -> int:
        whole = torch.stack(decode()).float()
        torch.nn.functional.interpolate(whole, (224, 299), mode="bilinear", antialias=True)[..., 37:261]
        return len(images)

    results.add("a: decode_jpeg on the device, 500 x 375", setting.rate(lambda: len(decode())), "images/s")
    results.add("a: decode_jpeg and resize to 224 on the device", setting.rate(resized), "images/s")


# -- b: distillation --------------------------------------------------------------------------------------------


def run_config(teacher: TeacherConfig, student: str, precision: str, **distill: Any) -> RunConfig:
    """A run's config."""
    return RunConfig(
        teacher=teacher,
        positives=SOURCE,
        corpus=SOURCE,
        student=StudentConfig(arch=student),
        distill=DistillConfig(**distill),
        resources={"precision": precision},
    )


def section_b(results: Results, setting: Setting, _: dict[str, Any]) -> None:
    """Distillation."""
    import torch

    from pukd_ray.distillation.data import Batch, InMemory
    from pukd_ray.distillation.training import Distillation, distil, frozen_teacher
    from pukd_ray.runtime.devices import Worker

    archs = ("resnet34_cifar", "resnet18_cifar") if not setting.quick else ("resnet20_cifar", "resnet20_cifar")
    teacher_settings = teacher_config(archs[0], 32, 10)
    weights = random_weights(teacher_settings, setting.device)
    count = 50_000 if not setting.quick else 256
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    examples = Batch(pixels, torch.full((count,), -1), torch.ones(count))

    def run_of(images: Callable[[RunConfig, Worker], Any], worker: Worker, steps: int, **distill: Any) -> Distillation:
        config = run_config(teacher_settings, archs[1], worker.precision, **distill)
        teacher, normalise = frozen_teacher(teacher_settings, weights, worker)
        base = torch.ones(10, dtype=torch.float64)
        return Distillation(config, images(config, worker), teacher, normalise, base, steps, worker)

    def rate_of(images: Callable[[RunConfig, Worker], Any], worker: Worker, **distill: Any) -> float:
        """Images/s of the product's loop, from the difference of a long and a short training."""
        batch = distill["batch_size"]
        short, long = (20, 20 + max(40, int(setting.seconds * 30_000 / batch))) if not setting.quick else (1, 3)
        seconds = []
        for steps in (5 if not setting.quick else 1, short, long):  # the first warms up
            run = run_of(images, worker, steps, **distill)
            setting.sync()
            began = time.perf_counter()
            distil(run)
            setting.sync()
            seconds.append(time.perf_counter() - began)
        return (long - short) * batch / (seconds[2] - seconds[1])

    def product(config: RunConfig, worker: Worker) -> Any:
        return InMemory(examples, config.distill.batch_size, config.seed, worker)

    def fixed(config: RunConfig, worker: Worker) -> Any:
        return Fixed(config.distill.batch_size, worker)

    usual = Worker(device=setting.device)
    kinds = {
        "": usual,
        ", step by step": replace(usual, captures=False),
        ", float32": replace(usual, precision="float32"),
    }
    for batch in (256, 1024) if not setting.quick else (32,):
        with results.part(f"b {archs[0]} -> {archs[1]}, batch {batch}"):
            bare = results.add(
                f"b bare step, batch {batch}: no adversary", bare_step(setting, archs, batch), "images/s"
            )
            for kind, worker in kinds.items():
                if kind and (setting.device.type == "cpu" or (batch > 256 and "float32" in kind)):
                    continue
                label = f"b RKD, batch {batch}{kind}"
                whole = results.add(
                    f"{label}: the product's loop", rate_of(product, worker, batch_size=batch), "images/s"
                )
                if not kind:
                    options = {"batch_size": batch, "augment": "none"}
                    same = results.add(
                        f"{label}: same step on resident data", rate_of(fixed, worker, **options), "images/s"
                    )
                    results.add(f"{label}: of the same step", whole / same, "")
                results.add(f"{label}: of the bare step", whole / bare, "")
    batch = 256 if not setting.quick else 32
    with results.part("b mixup"):
        mixed = rate_of(product, usual, batch_size=batch, mixup=0.2)
        results.add(f"b RKD, batch {batch}, mixup: the product's loop", mixed, "images/s")
    with results.part("b captured steps learn the same"):
        steps = 40 if not setting.quick else 2
        ends = [
            distil(run_of(product, worker, steps, batch_size=batch, lr=0.01))
            for worker in (usual, kinds[", step by step"])
        ]
        for name, (history, _) in zip(("captured", "step by step"), ends, strict=True):
            results.add(f"b loss after {steps} steps, {name}", history[-1][1], "")
        # Not the same to the bit: what is added up in another order drifts apart.
        one, other = ([v.float().flatten() for k, v in end[1][""].items() if "running" in k] for end in ends)
        gap = torch.cat(one) - torch.cat(other)
        results.add("b batch statistics: relative difference of both", float(gap.norm() / torch.cat(other).norm()), "")
    with results.part("b supervised"):
        supervised(results, setting, archs[0], examples)


@dataclass(frozen=True)
class Fixed:
    """The same resident random batch in every step."""

    rows: int
    worker: Any
    count: int = 0

    def batch(self, step: int) -> Any:
        """As `Images.batch`."""
        import torch

        from pukd_ray.distillation.data import Batch

        del step
        if "made" not in self.__dict__:
            device = self.worker.device
            pixels = torch.randint(0, 256, (self.rows, 3, 32, 32), dtype=torch.uint8, device=device)
            labels = torch.full((self.rows,), -1, device=device)
            self.__dict__["made"] = Batch(pixels, labels, torch.ones(self.rows, device=device))
        return self.__dict__["made"]

    def teacher_logits(self, step: int) -> None:
        """None: the teacher is asked in every step."""
        del step


def bare_step(setting: Setting, archs: tuple[str, str], batch: int) -> float:
    """Images/s of teacher and student on one resident batch, as short as it can be written."""
    import torch
    import torch.nn.functional as F

    from pukd_ray.networks.teacher import new_network
    from pukd_ray.runtime.devices import Worker, for_inference, to_fastest_layout

    worker = Worker(device=setting.device)
    config = teacher_config(archs[0], 32, 10)
    teacher = for_inference(new_network(archs[0], config), setting.device).requires_grad_(False)
    student = to_fastest_layout(worker.prepare(new_network(archs[1], config))).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=worker.fused)
    images = to_fastest_layout(torch.rand(batch, 3, 32, 32, device=setting.device))

    def work() -> int:
        steps = 20 if not setting.quick else 1
        for _ in range(steps):
            with worker.autocast(learns=True):
                with torch.no_grad():
                    target = teacher(images)
                logits = student(images)
            loss = F.kl_div(
                F.log_softmax(logits.float(), 1),
                F.log_softmax(target.float(), 1),
                reduction="batchmean",
                log_target=True,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return steps * batch

    return setting.rate(work)


def supervised(results: Results, setting: Setting, arch: str, examples: Any) -> None:
    """Images/s of a teacher's training."""
    import torch

    from pukd_ray.distillation.supervised import fit_classifier
    from pukd_ray.runtime.devices import Worker

    worker = Worker(device=setting.device)
    batch = 128 if not setting.quick else 32
    labels = torch.arange(len(examples)) % 10
    seconds = []
    counts = (batch * 20, batch * 20, min(len(examples), batch * 250)) if not setting.quick else (32, 32, 96)
    for count in counts:
        part = replace(examples.take(torch.arange(count)), labels=labels[:count])
        config = TeacherTrainingConfig(teacher=teacher_config(arch, 32, 10), train=SOURCE, epochs=1, batch_size=batch)
        setting.sync()
        began = time.perf_counter()
        fit_classifier(config, part, worker, lambda *_: None)
        setting.sync()
        seconds.append(time.perf_counter() - began)
    results.add(f"b supervised {arch} batch {batch}", (counts[2] - counts[1]) / (seconds[2] - seconds[1]), "images/s")


# -- c: the selector's fits -------------------------------------------------------------------------------------


def section_c(results: Results, setting: Setting, _: dict[str, Any]) -> None:
    """The selector's fits."""
    import torch

    from pukd_ray.config import SelectorConfig
    from pukd_ray.runtime.devices import ALONE, Worker
    from pukd_ray.selection.crossfit import FOLDS, fit_fold, fold_rows
    from pukd_ray.selection.grid import COARSE, fit_grid_fold
    from pukd_ray.selection.recipe import FinalFit, grid_training
    from pukd_ray.selection.training import Training, fit_selector

    n_u, n_p, width = (200_000, 1000, 4096) if not setting.quick else (2000, 100, 64)
    selector = SelectorConfig()
    on_gpu = Worker(device=setting.device)
    features = synthetic_features(n_p, n_u, width, setting.device)
    training = Training("nnpu", 0.21, selector.steps, selector.batch_size, selector.lr, 0, selector.batches)
    of_grid = grid_training(selector, 0)
    if setting.quick:
        training, of_grid = replace(training, steps=20, batch_size=64), replace(of_grid, steps=10, batch_size=64)
    size = f"{n_u:,} x {width:,}"

    def clock(work: Callable[[], Any]) -> float:
        setting.sync()
        began = time.perf_counter()
        work()
        setting.sync()
        return time.perf_counter() - began

    with results.part(f"c on the device, {size}"):
        results.add("c device: features to the device", clock(lambda: features.on(on_gpu)), "s")
        there = features.on(on_gpu)
        fit_grid_fold(there, fold_rows(there, 0, 0), replace(of_grid, steps=5), COARSE, on_gpu)  # warm
        grid = [clock(lambda: fit_grid_fold(there, fold_rows(there, 0, 0), of_grid, COARSE, on_gpu))]
        results.add(f"c device: fit_grid, one fold of {of_grid.steps} steps", min(grid), "s")
        folds = [clock(lambda: fit_fold(there, 0, training, worker=on_gpu))]
        results.add(f"c device: fit_folds, one fold of {training.steps} steps", min(folds), "s")
        final = clock(
            lambda: FinalFit.of(fit_selector(there, training, worker=on_gpu), there, training, 0.2, setting.device)
        )
        results.add(f"c device: final, {training.steps} steps", final, "s")
        on_device = results.add(
            "c device: all, one fold after the other", FOLDS * (2 * min(grid) + min(folds)) + final, "s"
        )
    with results.part(f"c on the CPU, {size}"):
        torch.set_num_threads(1)  # as the tasks of the folds do
        short, long = (2, 8) if not setting.quick else (2, 4)

        def extrapolated(work: Callable[[int], Any], steps: int) -> float:
            begin, end = clock(lambda: work(short)), clock(lambda: work(long))
            return begin + (end - begin) / (long - short) * (steps - short)

        part = features.take(np.arange(n_p), np.arange(n_u // 5))  # the start-up of 200,000 would take the time
        grid_cpu = extrapolated(
            lambda steps: fit_grid_fold(part, fold_rows(part, 0, 0), replace(of_grid, steps=steps), COARSE, ALONE),
            of_grid.steps,
        )
        results.add("c CPU: fit_grid, one fold, one thread, a fifth of U, extrapolated", grid_cpu, "s")
        fold_cpu = extrapolated(lambda steps: fit_selector(part, replace(training, steps=steps)), training.steps)
        results.add("c CPU: fit_folds, one fold, one thread, a fifth of U, extrapolated", fold_cpu, "s")
        waves = -(-FOLDS // setting.cpus)
        on_cpu = results.add(
            f"c CPU: all, folds on {setting.cpus} cores, extrapolated",
            waves * (2 * grid_cpu + fold_cpu) + fold_cpu,
            "s",
        )
        results.add("c: CPU over device", on_cpu / on_device, "times")


def synthetic_features(n_p: int, n_u: int, width: int, device: Any) -> Any:
    """P, and U of which a fifth is like P, shifted in some dimensions."""
    import torch

    from pukd_ray.selection.training import Examples

    own = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], relevant: Any) -> np.ndarray:
        found = torch.randn(shape, device=device, generator=own, dtype=torch.float32)
        found[..., : width // 16] += 0.6 * relevant
        half: np.ndarray = found.half().cpu().numpy()
        return half

    relevant = (torch.rand(n_u, 1, device=device, generator=own) < 0.2).float()
    u = np.concatenate([drawn((len(part), width), part) for part in relevant.split(20_000)])
    return Examples(drawn((n_p, 8, width), 1.0), u)


# -- d: agreement with float64 ----------------------------------------------------------------------------------


def section_d(results: Results, setting: Setting, _: dict[str, Any]) -> None:
    """Agreement."""
    with results.part("d: ResNet-34 at 32, trained here"):
        agreement(results, setting, "resnet34_cifar" if not setting.quick else "resnet20_cifar", 32, 10, trained=True)
    if not setting.quick:
        with results.part("d: ResNet-50 at 224, random weights"):
            agreement(results, setting, "resnet50", 224, 1000, trained=False)
    with results.part("d: what must not differ"):
        exact(results, setting)
    with results.part("d: the selector on the device and on the CPU"):
        selector_agreement(results, setting)


def striped(count: int, size: int, seed: int) -> tuple[Any, Any]:
    """(uint8 images, labels): ten directions of stripes under noise, so that a network can learn them."""
    import torch

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    at = np.arange(size) / size
    angle = labels * np.pi / 10
    wave = np.cos(angle)[:, None, None] * at[:, None] + np.sin(angle)[:, None, None] * at
    base = 128 + 50 * np.sin(2 * np.pi * 5 * wave + rng.random((count, 1, 1)) * 6)
    noisy = base[:, None] + rng.normal(0, 60, (count, 3, size, size))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def agreement(results: Results, setting: Setting, arch: str, size: int, classes: int, *, trained: bool) -> None:
    """Logits of selector and teacher in each arithmetic against float64, of images that differ in relevance."""
    import torch
    from scipy.stats import spearmanr

    from pukd_ray.distillation.data import Batch
    from pukd_ray.distillation.supervised import fit_classifier
    from pukd_ray.networks.selector import as_cached
    from pukd_ray.networks.teacher import Teacher, dump_state
    from pukd_ray.runtime.devices import Worker, to_device
    from pukd_ray.selection.training import Examples, Training, fit_selector

    device, config = setting.device, teacher_config(arch, size, classes)
    count = (4096 if size < 64 else 768) if not setting.quick else 64
    if trained:
        pixels, labels = striped(20_000 if not setting.quick else 128, size, 1)
        training = TeacherTrainingConfig(
            teacher=config,
            train=SOURCE,
            epochs=2 if not setting.quick else 1,
            batch_size=128 if not setting.quick else 32,
        )
        worker = Worker(device=device)
        network = fit_classifier(training, Batch(pixels, labels, torch.ones(len(labels))), worker, lambda *_: None)
        weights = dump_state(network.state_dict())
    else:
        weights = random_weights(config, device)
    pixels, labels = striped(count, size, 2)

    def run(teacher: Teacher, double: bool = False) -> tuple[Any, Any]:
        parts = []
        for part in pixels.split(128):
            there = to_device(part, device)
            if double:
                with torch.inference_mode():
                    x = teacher.normalise(there.double())
                    parts.append(teacher.extractor.features_and_logits(x))
            else:
                parts.append(teacher(there))
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, logits

    exact_teacher = Teacher(config, weights, device, "auto", "float32")
    exact_teacher.extractor.double().to(memory_format=torch.contiguous_format)
    exact_teacher.normalise.double()
    features, logits = run(exact_teacher, double=True)
    del exact_teacher
    # A selector of the striped images of classes 0 to 3, trained on float64's features.
    is_p = labels < 4
    cached = as_cached(features.float()).cpu().numpy()
    examples = Examples(cached[is_p.numpy()][:, None], cached)
    head = fit_selector(
        examples, Training("nnpu", 0.4, 300 if not setting.quick else 10, min(256, count // 2), 1e-3, 0),
        worker=Worker(device=device),
    )  # fmt: skip
    with torch.inference_mode():
        head.double()
        expected = (
            head(features.half().double() if not trained else features.clamp(-65504, 65504).half().double())
            .cpu()
            .numpy()
        )
        head.float()
    truth = logits.argmax(1).cpu()
    if trained:
        results.add(f"d {arch}@{size} float64: teacher's accuracy", float((truth == labels).float().mean()), "")
    results.add(f"d {arch}@{size} float64: share taken", float((expected > 0).mean()), "")
    for name in ("float32", "tf32", "float16", "bfloat16") if device.type != "cpu" else ("float32",):
        teacher = Teacher(config, weights, device, "auto", "float32" if name == "tf32" else name)  # type: ignore[arg-type]
        if name == "tf32":
            torch.backends.cudnn.allow_tf32 = True
        found, answers = run(teacher)
        with torch.inference_mode():
            z = head(as_cached(found).float()).cpu().numpy()
        error = float((found.double() - features).norm() / features.norm())
        results.add(f"d {arch}@{size} {name}: Spearman of pu_logit with float64", spearmanr(z, expected).statistic, "")
        results.add(f"d {arch}@{size} {name}: decisions that agree", float(((z > 0) == (expected > 0)).mean()), "")
        results.add(
            f"d {arch}@{size} {name}: teacher's labels that agree",
            float((answers.argmax(1).cpu() == truth).float().mean()),
            "",
        )
        results.add(f"d {arch}@{size} {name}: relative error of features", error, "")


def exact(results: Results, setting: Setting) -> None:
    """Views and batches on the device are those of the CPU to the bit; columns through pinned memory are in order."""
    import torch

    from pukd_ray.distillation.data import Batch, InMemory, augment
    from pukd_ray.runtime.devices import ALONE, BatchRunner, Worker

    pixels = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    there = pixels.to(setting.device)
    for kind in ("crop_flip", "crop"):
        same = torch.equal(augment(pixels, kind, (0, 4, 1), 300), augment(there, kind, (0, 4, 1), 300).cpu())
        results.add(f"d augment {kind}: the same as on the CPU", float(same), "")
    examples = Batch(pixels, torch.arange(300), torch.ones(300))
    here, other = (InMemory(examples, 64, 0, worker).batch(3) for worker in (ALONE, Worker(device=setting.device)))
    results.add("d batches: the same as on the CPU", float(torch.equal(here.pixels, other.pixels.cpu())), "")

    def sums(batch: Any) -> dict[str, Any]:
        return {"sum": batch.long().sum((1, 2, 3)), "first": batch[:, 0, 0, 0]}

    for rows in (None, 7, 64):
        runner = BatchRunner(sums, setting.device, rows)
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(runner, [pixels.numpy()] * 6))
        same = all((f["sum"] == pixels.long().sum((1, 2, 3)).numpy()).all() for f in found)
        results.add(f"d columns of 3 threads, batches of {rows}: as they should be", float(same), "")
    if setting.device.type != "cpu":
        free, _ = torch.cuda.mem_get_info()

        def greedy(batch: Any) -> dict[str, Any]:
            torch.empty(int(free * len(batch) / 100), dtype=torch.uint8, device=setting.device)
            return sums(batch)

        runner = BatchRunner(greedy, setting.device, 256)
        found_one = runner(pixels.numpy())
        same = (found_one["sum"] == pixels.long().sum((1, 2, 3)).numpy()).all()
        results.add("d out of memory: columns as they should be", float(same), "")
        results.add(
            "d out of memory: rows per batch, of 256, where 100 fill the card", float(runner.batch_rows or 0), "rows"
        )


def selector_agreement(results: Results, setting: Setting) -> None:
    """Held-out logits of a fold: other random masks, so not the same numbers but the same ranks."""
    from scipy.stats import spearmanr

    from pukd_ray.runtime.devices import ALONE, Worker
    from pukd_ray.selection.crossfit import fit_fold
    from pukd_ray.selection.training import Training

    features = synthetic_features(200, 4000 if not setting.quick else 400, 256, setting.device)
    training = Training("nnpu", 0.21, 300 if not setting.quick else 20, 256, 1e-3, 0)
    here = fit_fold(features, 0, training, worker=ALONE)
    there = fit_fold(features, 0, training, worker=Worker(device=setting.device))
    again = fit_fold(features, 0, replace(training, seed=0), worker=Worker(device=setting.device))
    results.add(
        "d selector, held-out logits of U: Spearman of device and CPU",
        spearmanr(here.u_logits[-1], there.u_logits[-1]).statistic,
        "",
    )
    results.add(
        "d selector: largest difference of two runs on the device",
        float(np.abs(there.u_logits - again.u_logits).max()),
        "",
    )


# -- running ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Results, Setting, dict[str, Any]], None]] = {
    "a": section_a, "b": section_b, "c": section_c, "d": section_d, "e": section_e,
}  # fmt: skip


def environment(device: Any) -> dict[str, Any]:
    """What a figure means nothing without."""
    import torch
    import torchvision

    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "device": "CPU",
    }
    if device.type != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def main() -> None:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="a,b,c,d,e", help="which, in this order")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the code")
    parser.add_argument("--device", help="cuda or cpu; by default what there is")
    parser.add_argument("--precisions", default="float32,tf32,float16,bfloat16", help="of section a")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement, at least")
    options = parser.parse_args()
    asked = options.sections.split(",")
    cpus = len(os.sched_getaffinity(0))
    results = Results()
    # Before the device is touched: a process that holds one cannot be forked.
    if "a" in asked:
        from pukd_ray.runtime.devices import CALL_BYTES

        SLOTS.extend(mmap.mmap(-1, CALL_BYTES) for _ in range(3 if options.quick else 6))
    pools = {"decode": mp.get_context("fork").Pool(cpus)} if "a" in asked else {}
    import torch

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    precisions = ("float32",) if kind == "cpu" else tuple(options.precisions.split(","))
    setting = Setting(device, options.quick, 0.05 if options.quick else options.seconds, cpus, precisions)
    facts = environment(device)
    print(json.dumps(facts), flush=True)
    began = time.perf_counter()
    for name in asked:
        with results.part(f"section {name}"):
            SECTIONS[name](results, setting, pools)
        if options.output:
            options.output.write_text(json.dumps({"environment": facts, "results": results.rows}, indent=1))
    for pool in pools.values():
        pool.terminate()
    print(f"\n{facts['device']}, torch {facts['torch']}, {cpus} CPUs: {time.perf_counter() - began:.0f} s\n")
    print("| what | value | unit |\n|---|---|---|")
    for row in results.rows:
        value = row["error"] if "error" in row else f"{row['value']:,.4g}"
        print(f"| {row['name']} | {value} | {row.get('unit', '')} |")


if __name__ == "__main__":
    main()
