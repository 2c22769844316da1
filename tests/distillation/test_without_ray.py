"""What needs torch alone stays so: a student is used, and a training tried out, where neither Ray nor a run is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pukd_ray.config import TeacherConfig
from pukd_ray.networks.teacher import dump_state, new_network

OF_A_RUN = ("ray", "pukd_ray.run", "pukd_ray.runtime.engine", "pukd_ray.corpus.reading")


def modules_after(code: str, *arguments: str) -> list[str]:
    """Modules that a new process has imported when it has run `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def of_a_run(modules: list[str]) -> list[str]:
    return [m for m in modules if any(m == name or m.startswith(f"{name}.") for name in OF_A_RUN)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `load_student` reads, with random weights, and an image."""
    folder = tmp_path_factory.mktemp("student")
    preprocessing = {"input_size": 28, "channels": 1, "mean": [0.5], "std": [0.5], "resize": "crop"}
    network = new_network("lenet5_half", TeacherConfig(arch="lenet5_half", weights="w", num_classes=3, **preprocessing))
    (folder / "student.pt").write_bytes(dump_state(network.state_dict()))
    meta = {"arch": "lenet5_half", "num_classes": 3, "classes": ["a", "b", "c"], "preprocessing": preprocessing}
    (folder / "meta.json").write_text(json.dumps(meta))
    sink = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(sink, "PNG")
    (folder / "image.png").write_bytes(sink.getvalue())
    return folder


def test_a_student_needs_neither_ray_nor_the_run(student: Path) -> None:
    code = """
from pathlib import Path
from pukd_ray import load_student
student = load_student(sys.argv[1])
probabilities = student([Path(sys.argv[1], "image.png").read_bytes()])
assert probabilities.shape == (1, 3) and abs(float(probabilities.sum()) - 1) < 1e-5
assert student.classes == ("a", "b", "c")
"""
    modules = modules_after(code, str(student))
    assert "pukd_ray.distillation.student" in modules
    assert of_a_run(modules) == []


@pytest.mark.parametrize("name", ["data", "loss", "training", "weights"])
def test_training_is_plain_torch(name: str) -> None:
    modules = modules_after(f"import pukd_ray.distillation.{name}")
    assert f"pukd_ray.distillation.{name}" in modules
    assert of_a_run(modules) == []


def test_what_belongs_to_a_run_would_be_found() -> None:
    assert of_a_run(modules_after("import pukd_ray.distillation.worker")) != []
