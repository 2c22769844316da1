"""Positive-unlabelled compression of image classifiers on Ray: the public names, nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AttentionHead": "networks.head",
    "ConfigError": "config",
    "MultiScaleExtractor": "networks.features",
    "PriorEstimate": "selection.prior",
    "RunConfig": "config",
    "RunError": "errors",
    "RunResult": "pipeline",
    "SCORES_SCHEMA": "run.folder",
    "bbe_prior": "selection.prior",
    "class_weights": "distillation.weights",
    "load_config": "preflight",
    "load_student": "distillation.student",
    "nnpu_risk": "selection.risk",
    "run_pipeline": "pipeline",
    "worst_case_weights": "distillation.weights",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from pukd_ray.config import ConfigError as ConfigError
    from pukd_ray.config import RunConfig as RunConfig
    from pukd_ray.distillation.student import load_student as load_student
    from pukd_ray.distillation.weights import class_weights as class_weights
    from pukd_ray.distillation.weights import worst_case_weights as worst_case_weights
    from pukd_ray.errors import RunError as RunError
    from pukd_ray.networks.features import MultiScaleExtractor as MultiScaleExtractor
    from pukd_ray.networks.head import AttentionHead as AttentionHead
    from pukd_ray.pipeline import RunResult as RunResult
    from pukd_ray.pipeline import run_pipeline as run_pipeline
    from pukd_ray.preflight import load_config as load_config
    from pukd_ray.run.folder import SCORES_SCHEMA as SCORES_SCHEMA
    from pukd_ray.selection.prior import PriorEstimate as PriorEstimate
    from pukd_ray.selection.prior import bbe_prior as bbe_prior
    from pukd_ray.selection.risk import nnpu_risk as nnpu_risk


def __getattr__(name: str) -> Any:
    """Import public names on first use: torch and Ray take seconds, and not every process needs both."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pukd_ray' has no attribute {name!r}")
    return getattr(import_module(f"pukd_ray.{_PUBLIC[name]}"), name)
