"""What all contenders do: the network, the head, how their scores become a table, and which bytes are kept.

torch is imported where it is used: a driver of this project has no need of it for a pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from pukd_ray.config import RunConfig, ScoreConfig, SelectorConfig, SourceConfig, TeacherConfig
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.run.folder import RunFolder
from pukd_ray.selection.calibration import Calibration, to_json
from pukd_ray.storage import write_bytes

if TYPE_CHECKING:
    from pukd_ray.networks.selector import SelectorHead
    from pukd_ray.networks.teacher import Teacher

NETWORKS: dict[str, tuple[int, Literal[1, 3]]] = {"lenet5": (28, 1), "resnet18_cifar": (32, 3), "resnet18": (224, 3)}
"""Input size and channels."""
KEPT = 0.1
"""Share of the images whose bytes are kept, about."""


@dataclass(frozen=True)
class Task:
    """A corpus and the artefacts of a selector, in a folder laid out as a run's."""

    folder: Path
    corpus: Path
    network: str

    @property
    def teacher(self) -> TeacherConfig:
        """Random weights: what they say takes as long."""
        size, channels = NETWORKS[self.network]
        return TeacherConfig(
            arch=self.network,
            weights=str(self.folder / "teacher.pt"),
            num_classes=10,
            input_size=size,
            channels=channels,
            mean=[0.45] * channels,
            std=[0.25] * channels,
        )

    @property
    def config(self) -> RunConfig:
        """Of a run that has come to stage `score`."""
        return RunConfig(
            name="benchmark",
            output=str(self.folder),
            teacher=self.teacher,
            positives=(SourceConfig(uri=str(self.corpus)),),
            corpus=(SourceConfig(uri=str(self.corpus)),),
            selector=SelectorConfig(grid=1, blend=False),
            score=ScoreConfig(keep_above=0.5),
        )

    @property
    def weights(self) -> bytes:
        """The teacher's state_dict."""
        return (self.folder / "teacher.pt").read_bytes()

    def load(self) -> tuple[Teacher, SelectorHead, Calibration]:
        """The networks on the CPU."""
        import torch

        from pukd_ray.networks.selector import load_head
        from pukd_ray.networks.teacher import Teacher

        teacher = Teacher(self.teacher, self.weights, torch.device("cpu"))
        head, _ = load_head((self.folder / "selector/head.pt").read_bytes())
        calibration = json.loads((self.folder / "selector/calibration.json").read_text())
        return teacher, head, Calibration(**{k: v for k, v in calibration.items() if k != "bootstrap"})


def prepare(folder: Path, corpus: Path, network: str, sample: list[bytes]) -> Task:
    """Write the artefacts; the calibration is such that `KEPT` of `sample` is likely."""
    import torch

    from pukd_ray.corpus.pixels import decode_batch
    from pukd_ray.networks.selector import SelectorHead
    from pukd_ray.networks.teacher import Teacher, dump_state, new_network

    task = Task(folder, corpus, network)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (folder / "teacher.pt").write_bytes(dump_state(new_network(network, task.teacher).state_dict()))
    teacher = Teacher(task.teacher, task.weights, torch.device("cpu"))
    head = SelectorHead(teacher.extractor.channels).eval()
    pixels = np.stack([p for p in decode_batch(sample, pixel_spec(task.teacher))[0] if p is not None])
    features = teacher(pixels)[0]
    head.mean.copy_(features.mean(0))
    head.std.copy_(features.std(0).clamp_min(1e-3))
    with torch.no_grad():
        logits = head(features).numpy()
    slope = 1 / max(float(logits.std()), 1e-6)
    calibration = Calibration(slope, -slope * float(np.quantile(logits, 1 - KEPT)))
    write_bytes(*_at(folder, "selector/head.pt"), dump_state({**head.state_dict(), "log_max_phi": torch.zeros(())}))
    run = RunFolder(str(folder))
    run.write_json("selector/calibration.json", to_json(calibration, []))
    run.write_json("selector/features.json", {"files": [], "images": 1000, "seconds": 1.0})
    return task


def _at(folder: Path, name: str) -> tuple[pa.fs.FileSystem, str]:
    run = RunFolder(str(folder))
    return run.fs, run.path(name)


def fresh(task: Task, folder: Path) -> Task:
    """The same task in a folder of its own, with nothing scored."""
    (folder / "selector").mkdir(parents=True)
    for name in ("teacher.pt", "selector/head.pt", "selector/calibration.json", "selector/features.json"):
        (folder / name).write_bytes((task.folder / name).read_bytes())
    return replace(task, folder=folder)
