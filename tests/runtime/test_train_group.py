"""Two real gloo processes under DistributedDataParallel must give the gradients of one process.

Both processes run every case once (the `two_processes` fixture); the tests then compare.
"""

import json
import math
import os
import time
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pukd_ray.config import DistillConfig, ResourcesConfig
from pukd_ray.distillation.data import Batch, InMemory
from pukd_ray.distillation.loss import rkd_objective
from pukd_ray.distillation.training import measure_classes
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import Worker
from pukd_ray.runtime.engine import Cluster
from pukd_ray.runtime.train_group import train_group
from pukd_ray.selection.risk import naive_risk, nnpu_risk, vpu_risk

RANKS = 2
SPLIT = 7  # rank 0 has the first 7 of 20 samples
GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["nnpu_data_parallel"]


def network(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def samples():
    """Inputs [20, 6] and their mixed versions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 20, 6, dtype=torch.float64, generator=generator)


def labels(positives):
    y = torch.full((20,), -1)
    y[list(positives)] = 1
    return y


BOTH, RANK_1_ONLY = labels([0, 3, 9, 12, 15]), labels([8, 13, 19])


def pu_case(risk, y):
    def run(model, rows, group):
        return risk(model(samples()[0, rows]).squeeze(1), y[rows], group)

    return 1, run


def vpu_case():
    def run(model, rows, group):
        y = BOTH[rows]
        x, mixed = samples()[:, rows]
        # One forward pass, as DistributedDataParallel wants it.
        z = model(torch.cat([x, mixed[y == -1]])).squeeze(1)
        return vpu_risk(z[: len(y)], y, z[len(y) :], 0.4, group=group)

    return 1, run


def rkd_case(adversary, temperature=1.0):
    def run(model, rows, group):
        x, other = samples()[:, rows]
        teacher = 2 * torch.cat([x[:, :4], other[:, :1]], dim=1)
        return rkd_objective(
            model(x),
            teacher,
            base_weights=torch.tensor([0.3, 0.8, 1.0, 1.2, 1.7]),
            epsilon=0.1,
            adversary=adversary,
            temperature=temperature,
            group=group,
            draws=torch.tensor([[1.0, 1, 1, 1, 1], [1, 2, 1, 1, 1], [1, 1, 1, 2, 1]]),
        )

    return 5, run


CASES = {
    "nnpu, normal branch": pu_case(lambda z, y, group: nnpu_risk(z, y, 0.3, group=group), BOTH),
    # A scorer that knows the labels, with a high prior: r_minus is far below 0.
    "nnpu, negative branch": pu_case(
        lambda z, y, group: nnpu_risk(z + 4 * y, y, 0.8, beta=0.01, gamma=0.7, group=group), BOTH
    ),
    "nnpu, no P on rank 0": pu_case(lambda z, y, group: nnpu_risk(z, y, 0.3, group=group), RANK_1_ONLY),
    "naive": pu_case(lambda z, y, group: naive_risk(z, y, group=group), BOTH),
    "naive, no P on rank 0": pu_case(lambda z, y, group: naive_risk(z, y, group=group), RANK_1_ONLY),
    "vpu": vpu_case(),
    "rkd, l2_sum_zero": rkd_case("l2_sum_zero"),
    "rkd, linf_sum_zero": rkd_case("linf_sum_zero", temperature=4.0),
    "rkd, draws": rkd_case("draws"),
    "rkd, none": rkd_case("none"),
}


def step(name, model, rows, group):
    """[value, weights if any, gradient of each parameter] of one step of a case."""
    value, objective, *weights = CASES[name][1](model, rows, group)
    objective.backward()
    return [value, *weights, *(p.grad.clone() for p in model.parameters())]


def golden_step(rank, group):
    """Value and DDP's gradient on the logits of golden.json: shards 0 and 1 on rank 0, 2 and 3 on rank 1."""
    shards = slice(2 * rank, 2 * rank + 2)
    z = torch.tensor(list(chain(*GOLDEN["shard_logits"][shards])), dtype=torch.float64, requires_grad=True)
    y = torch.tensor(list(chain(*GOLDEN["shard_y"][shards])))
    value, objective = nnpu_risk(z, y, GOLDEN["prior"], group=group)
    (grad,) = torch.autograd.grad(objective, z)
    return [value, grad / RANKS]


def teacher_answers(rank, world):
    """[class weights, class sums, teacher's answers for the rank's part of step 1] on 21 images, kept in memory."""
    pixels = torch.arange(21 * 4, dtype=torch.uint8).view(21, 1, 2, 2)
    images = InMemory(Batch(pixels, torch.full((21,), -1), torch.ones(21)), 6, 0, Worker(rank, world))
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = measure_classes(lambda p: teacher(p / 80), images, DistillConfig(augment="none"), 3, Worker(rank, world))
    answers = images.teacher_logits(1)
    torch.testing.assert_close(answers, teacher(images.batch(1).pixels / 80))
    return [*found, answers.detach()]


def faulty_step(rank, group, rkd):
    """The message of the error that a NaN on rank 1 raises on this rank."""
    x = torch.tensor([[0.5, math.nan if rank else 1.0]])
    try:
        if rkd:
            rkd_objective(x, torch.ones(1, 2), base_weights=torch.ones(2), epsilon=0.1, adversary="l2", group=group)
        else:
            nnpu_risk(x[0], torch.tensor([1, -1]), 0.3, group=group)
    except ValueError as error:
        return str(error)
    return None


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", timedelta(seconds=120), world_size=RANKS, rank=rank)
    group = dist.group.WORLD
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    results = {
        name: step(name, Worker(rank, RANKS).prepare(network(outputs)), rows, group)
        for name, (outputs, _) in CASES.items()
    }
    results["golden"] = golden_step(rank, group)
    results["teacher's answers"] = teacher_answers(rank, RANKS)
    results["faulty"] = [faulty_step(rank, group, rkd) for rkd in (False, True)]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    processes = mp.spawn(worker, (str(folder),), nprocs=RANKS, join=False)
    deadline = time.monotonic() + 200
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the two processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(two_processes, name):
    alone = step(name, network(CASES[name][0]), slice(None), None)
    assert any(bool((t.abs() > 1e-3).any()) for t in alone[-4:])
    for rank in range(RANKS):
        torch.testing.assert_close(two_processes[rank][name], alone, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize(("name", "negative"), [("nnpu, normal branch", False), ("nnpu, negative branch", True)])
def test_cases_take_the_branch_they_are_named_after(name, negative):
    """The objective is the value in the normal branch only."""
    value, objective = CASES[name][1](network(1), slice(None), None)
    assert math.isclose(value.item(), objective.item()) is not negative


@pytest.mark.parametrize("name", ["rkd, l2_sum_zero", "rkd, linf_sum_zero", "rkd, draws"])
def test_ranks_alone_would_choose_other_weights(name):
    """So equal weights in the comparison above prove that the worst case is that of the global batch."""
    whole, *shards = (
        CASES[name][1](network(5), rows, None)[2] for rows in (slice(None), slice(SPLIT), slice(SPLIT, None))
    )
    assert not all(torch.allclose(shard, whole, rtol=1e-3) for shard in shards)


def test_golden_shards(two_processes):
    expected = GOLDEN["expected_global"]
    for rank in range(RANKS):
        assert two_processes[rank]["golden"][0].item() == pytest.approx(expected["value"], rel=1e-9)
    grad = torch.cat([two_processes[rank]["golden"][1] for rank in range(RANKS)])
    torch.testing.assert_close(grad, grad.new_tensor(expected["grad"]), rtol=1e-9, atol=0)
    assert not torch.allclose(grad, grad.new_tensor(GOLDEN["naive"]["averaged_grad"]), rtol=0.1)


def test_all_ranks_know_the_teachers_answers_on_all_images(two_processes):
    weights, sums, answers = teacher_answers(0, 1)
    for rank in range(RANKS):
        expected = [weights, sums, answers[rank::RANKS]]
        torch.testing.assert_close(two_processes[rank]["teacher's answers"], expected)


def test_a_nan_on_one_rank_stops_all(two_processes):
    """A rank that raised before the collective would leave the others waiting for it."""
    for rank in range(RANKS):
        for message in two_processes[rank]["faulty"]:
            assert "finite" in message


@pytest.mark.usefixtures("ray_cluster")
def test_a_lost_worker_is_replaced_and_a_fault_of_the_program_is_not_tried_again(tmp_path: Path) -> None:
    def loop(setup):
        tries = setup["tries"]
        with tries.open("a") as log:
            log.write("x")
        if len(tries.read_text()) == 1:
            os._exit(9)
        raise ValueError("the loss is NaN")

    setup, folder = {"tries": tmp_path / "tries"}, RunFolder(str(tmp_path / "run"))
    with pytest.raises(Exception, match="the loss is NaN"):
        train_group(loop, setup, folder, "selector", ResourcesConfig(), Cluster(2, 0, 1, False))
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.usefixtures("ray_cluster")
def test_an_elastic_group_has_as_many_workers_as_fit(tmp_path: Path) -> None:
    """Two CPUs hold two of up to three."""

    def loop(setup):
        worker = Worker.current()
        return {"world": worker.world, "parts": worker.everyones(list(range(setup["rows"]))[worker.mine])}

    folder = RunFolder(str(tmp_path / "run"))
    report = train_group(
        loop, {"rows": 7}, folder, "selector", ResourcesConfig(train_workers=(1, 3)), Cluster(2, 0, 1, False)
    )
    assert report == {"world": 2, "parts": [[0, 2, 4, 6], [1, 3, 5]]}
