"""What started a run and what it is made with: job, versions, cluster, commit. Importing it does not import Ray."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pukd_ray import __version__

if TYPE_CHECKING:
    from pukd_ray.runtime.engine import Cluster

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "pillow", "scikit-learn")


def under_job() -> bool:
    """Whether `ray job submit` started this process."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def describe_environment(cluster: Cluster) -> dict[str, Any]:
    """Content of `environment.json`."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"pukd_ray": __version__} | {name: version(name) for name in _PACKAGES},
        "cluster": vars(cluster),
        "cpus_of_driver": os.cpu_count(),
        "commit": commit.stdout.strip() or None,
    }
