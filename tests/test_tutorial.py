"""docs/tutorial.md, run as a reader would: every block, word for word, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from heads import environment

DOCS = Path(__file__).parents[1] / "docs"


def notebook_maker() -> ModuleType:
    spec = spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_page() -> None:
    made = notebook_maker().notebook((DOCS / "tutorial.md").read_text())
    assert (DOCS / "tutorial.ipynb").read_text() == made, "run: python docs/notebook.py"
    kinds = [cell["cell_type"] for cell in json.loads(made)["cells"]]
    assert kinds.count("code") > 8


@pytest.mark.slow  # some minutes
@pytest.mark.timeout(400)
def test_every_block_runs(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="the tutorial's teacher is timm's")
    maker = notebook_maker()
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "pukd").write_text(f'#!/bin/sh\nexec {sys.executable} -m pukd_ray "$@"\n')  # of this very checkout
    (commands / "pukd").chmod(0o755)
    env = environment(PATH=f"{commands}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1")
    told = []
    for language, code in maker.blocks((DOCS / "tutorial.md").read_text()):
        if language == "yaml":
            name, content = maker.file_of(code)
            (tmp_path / name).write_text(content)
            continue
        command = ["bash", "-ec"] if language == "bash" else [sys.executable, "-c"]
        ended = subprocess.run([*command, code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, f"{code}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        told.append(ended.stdout + ended.stderr)
    assert "exit status 2" in "".join(told)
    metrics = json.loads((tmp_path / "runs" / "shop" / "metrics.json").read_text())
    assert metrics["n_selected"] == 400
    assert metrics["n_corpus"] == 3200
    assert metrics["student"]["top1"] > 0.5
