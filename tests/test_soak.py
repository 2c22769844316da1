"""The soak itself, short, and what it would find."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pukd_ray.run.folder import SCORES_SCHEMA
from pukd_ray.run.stages import EVERY_RUN
from pukd_ray.soak.driver import Driver
from pukd_ray.soak.faults import FAULTS
from pukd_ray.soak.running import Tally
from pukd_ray.soak.task import Difference, Left, compare

ROWS = 4


def scores(ids: range) -> pa.Table:
    count = len(ids)
    filled = {
        "image_id": [f"../{i}" for i in ids],
        "source": ["/lake/a"] * count,
        "source_row": list(ids),
        "content_hash": list(ids),
        "pu_logit": [float(i) for i in ids],
        "teacher_label": [0] * count,
    }
    columns = [pa.array(filled.get(field.name, [None] * count), field.type) for field in SCORES_SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCORES_SCHEMA)


def write_run(run: Path) -> None:
    """A finished run of two chunks."""
    for folder in ("scores", "markers/score", "selected", "student"):
        (run / folder).mkdir(parents=True)
    for chunk in range(2):
        pq.write_table(scores(range(chunk * ROWS, (chunk + 1) * ROWS)), run / f"scores/{chunk}.parquet")
        manifest = {"files": [f"scores/{chunk}.parquet"], "units": [f"u{chunk}"]}
        (run / f"markers/score/{chunk}.json").write_text(json.dumps(manifest))
    pq.write_table(pa.table({"image_id": ["../1"]}), run / "selected" / "part-00000.parquet")
    torch.save({"w": torch.arange(3.0)}, run / "student" / "student.pt")
    (run / "student" / "training.json").write_text(json.dumps({"loss": {"student": [[10, 0.5]]}}))


def lose(run: Path) -> None:
    pq.write_table(scores(range(ROWS - 1)), run / "scores" / "0.parquet")


def double(run: Path) -> None:
    pq.write_table(scores(range(ROWS + 1)), run / "scores" / "0.parquet")


def orphan(run: Path) -> None:
    pq.write_table(scores(range(2)), run / "scores" / "x.parquet")


def unit_again(run: Path) -> None:
    file = run / "markers/score/1.json"
    file.write_text(file.read_text().replace("u1", "u0"))


def attempt(run: Path) -> None:
    (run / "attempts" / "0-x").mkdir(parents=True)


def score(run: Path) -> None:
    table = scores(range(ROWS))
    at = table.schema.get_field_index("pu_logit")
    pq.write_table(table.set_column(at, "pu_logit", pa.array([9.0] * ROWS, pa.float32())), run / "scores" / "0.parquet")


def selection(run: Path) -> None:
    pq.write_table(pa.table({"image_id": ["../2"]}), run / "selected" / "part-00000.parquet")


def student(run: Path) -> None:
    torch.save({"w": torch.zeros(3)}, run / "student" / "student.pt")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda _: None, Difference(8, 0, 0, ())),
        (lose, Difference(7, 1, 0, ())),
        (double, Difference(9, 0, 1, ())),
        (orphan, Difference(8, 0, 0, ("scores/ holds other files than the manifests name",))),
        (unit_again, Difference(8, 0, 0, ("a unit is in two chunks",))),
        (attempt, Difference(8, 0, 0, ("attempts are left",))),
        (score, Difference(8, 0, 0, ("column pu_logit differs",))),
        (selection, Difference(8, 0, 0, ("other images are selected",))),
        (student, Difference(8, 0, 0, ("the student is another",))),
    ],
)
def test_what_went_wrong_is_found(tmp_path: Path, spoil: Callable[[Path], None], found: Difference) -> None:
    write_run(tmp_path)
    calm = Left.of(tmp_path)
    spoil(tmp_path)
    assert compare(tmp_path, calm) == found


def test_whatever_came_out_otherwise_fails_the_soak() -> None:
    assert not Tally(runs=3, images=24).wrong
    assert Tally(lost=1).wrong
    assert Tally(double=1).wrong
    assert Tally(different=["column pu_logit differs"]).wrong


def soak(*arguments: str) -> str:
    """What a soak says in a process of its own: it looks after all that its process has started."""
    ended = subprocess.run(
        [sys.executable, "-m", "pukd_ray", "soak", *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.timeout(600)
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    shown = soak("--faults", "3", "--seed", "5", "--folder", str(tmp_path / "soak"))
    assert " 3 faults, " in shown
    assert "lost 0, double 0, otherwise different 0" in shown
    assert [p.name for p in (tmp_path / "soak").iterdir()] == ["drivers.log"]
    assert [p.name for p in tmp_path.iterdir()] == ["soak"]  # ids that look like paths are none


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_faults_of_all_kinds_in_all_stages_lose_nothing(tmp_path: Path) -> None:
    shown = soak("--faults", "28", "--folder", str(tmp_path / "soak"))
    print(shown)
    lines = {line.partition(" ")[0]: line for line in shown.splitlines()}
    assert all(f"{fault.name} " in lines["faults"] for fault in FAULTS)
    assert all(f"{stage} " in lines["stages"] for stage in EVERY_RUN)


LOSES_ITS_HEAD = """
import time
from pathlib import Path
from random import Random
from pukd_ray.soak.faults import FAULTS, Nodes, Scene
import psutil  # Ray brings it

nodes = Nodes()
try:
    nodes.check()
    while not any("Agent" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)):
        time.sleep(0.1)
    kill_worker = next(fault.strike for fault in FAULTS if fault.name == "worker killed")
    scene = Scene(None, None, nodes, Path(), Random(0), Path(), {})
    print("worker", kill_worker(scene))
    head = nodes._cluster.head_node.all_processes["raylet"][0].process
    nodes.lose_one()  # a fault, after which there is another one
    nodes.check()
    print("whole")
    head.kill()
    head.wait(10)
    nodes.check()
finally:
    nodes.end()
"""


@pytest.mark.timeout(120)
def test_a_soak_says_that_its_own_cluster_is_gone() -> None:
    ended = subprocess.run([sys.executable, "-c", LOSES_ITS_HEAD], capture_output=True, text=True, check=False)
    assert "RunError: soak: the head of its own cluster is gone" in ended.stderr, ended.stderr
    # Nobody works: the agents of a node, which are called ray:: too, are left alone.
    assert ended.stdout.endswith("worker False\nwhole\n")


def test_a_driver_that_is_dead_answers_so_though_its_child_holds_its_output(tmp_path: Path) -> None:
    starts = "import subprocess; child = subprocess.Popen(['sleep', '60'], stdin=subprocess.DEVNULL)"
    (tmp_path / "sitecustomize.py").write_text(
        f"{starts}\nwith open({str(tmp_path / 'child')!r}, 'w') as f:\n    f.write(str(child.pid))\n"
    )
    driver = Driver(dict(os.environ) | {"PYTHONPATH": str(tmp_path)}, tmp_path / "log")
    child = tmp_path / "child"
    while not (child.exists() and child.read_text()):
        time.sleep(0.05)
    try:
        driver.end()
        assert driver.answer(10) is None
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)
