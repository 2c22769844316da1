"""A config file and its overrides -> a checked config, or ConfigError with all faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pukd_ray.config import (
    ConfigError,
    DistillConfig,
    ResourcesConfig,
    RunConfig,
    SelectorConfig,
    Sources,
    TeacherTrainingConfig,
    TrackingConfig,
    worker_faults,
)
from pukd_ray.preflight.document import apply_overrides, build_on, parse_document, read_document
from pukd_ray.preflight.faults import validate
from pukd_ray.preflight.files import export_faults, file_faults, output_faults, read_class_names, resolve_paths
from pukd_ray.preflight.secrets import secret_faults
from pukd_ray.run.folder import RunFolder

T = TypeVar("T")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML file, apply `overrides` such as `{"selector.prior": 0.2}`, check all that can be checked.

    Input paths become absolute (relative ones resolve against the file's folder); `output` is left as it is. The key
    `base` names another config, from whose folder on its own paths resolve: this one's keys replace its, one by one in
    sections, lists as a whole.
    Raises ConfigError whose `faults` has one line per fault, each naming its key.

    Examples:
        The bundled demo, with a prior that is known; and with two faults.

        >>> from pathlib import Path
        >>> import pukd_ray.demo
        >>> from pukd_ray import ConfigError, load_config
        >>> demo = Path(pukd_ray.demo.__path__[0]) / "demo.yaml"
        >>> config = load_config(demo, {"selector.prior": 0.25})
        >>> config.selector.prior, config.teacher.arch, config.score.keep_images
        (0.25, 'lenet5', 'likely')
        >>> try:
        ...     load_config(demo, {"selector.prior": 25, "distill.lrr": 0.1})
        ... except ConfigError as error:
        ...     for fault in error.faults:
        ...         print(fault)
        selector.prior: 25 should be auto or audit or below 1
        distill.lrr: unknown key; did you mean distill.lr?
    """
    return load(path, overrides, RunConfig)


def config_of_run(folder: RunFolder) -> RunConfig:
    """The resolved config that a run left in its folder, for those who only read it: its files are not looked at.

    ConfigError if there is none, or it is of a version with other keys.
    """
    if not folder.exists("config.yaml"):
        raise ConfigError([f"{folder.display}: holds no run (no config.yaml): give the `output` of its config"])
    name = f"{folder.display}/config.yaml"
    config, faults = validate(parse_document(folder.read_bytes("config.yaml").decode(), name), RunConfig)
    if config is None:
        raise ConfigError([f"{name}: {fault}" for fault in faults])
    return config


def load_teacher_training(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TeacherTrainingConfig:
    """As `load_config`, for `pukd train-teacher`; `teacher.weights` is an output there."""
    return load(path, overrides, TeacherTrainingConfig, writes_teacher=lambda _: True)


def load(
    path: str | Path,
    overrides: Mapping[str, Any] | None,
    kind: type[T],
    *,
    writes_teacher: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> T:
    """As `load_config`, for any class of configs with a `teacher`, and a `student` if it is a RunConfig.

    `writes_teacher` says of the document, overridden and with absolute paths but not yet checked, whether
    `teacher.weights` is yet to be written.
    """
    source_keys = _source_keys(kind)
    raw = _read_with_base(Path(path), source_keys, ())
    faults = apply_overrides(raw, overrides or {})
    if secrets := secret_faults(raw):
        raise ConfigError(secrets)  # alone: other faults may quote them
    raw = resolve_paths(raw, Path(path).absolute().parent, source_keys)
    faults += read_class_names(raw)
    config, value_faults = validate(raw, kind)
    for key in overrides or {}:  # of an override, name all of the key that was given
        value_faults = [
            key + f.removeprefix(f.partition(":")[0])
            if ": unknown key" in f and key.startswith(f.partition(":")[0] + ".")
            else f
            for f in value_faults
        ]
    faults += value_faults
    at_fault = {fault.partition(":")[0] for fault in faults}
    is_run = issubclass(kind, RunConfig)
    if is_run and config is None:
        faults += _worker_faults(raw, at_fault)
    if isinstance(config, RunConfig):
        faults += _tracking_faults(config.tracking) + output_faults(config)
    faults += file_faults(raw, at_fault, source_keys, writes_teacher=writes_teacher(raw), has_student=is_run)
    if isinstance(config, RunConfig) and config.export:
        faults += export_faults(config.export)
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return config


def _read_with_base(path: Path, source_keys: Sequence[str], above: tuple[Path, ...]) -> dict[str, Any]:
    """A config file's keys, its paths absolute, on top of those of the file that its `base` names, and so on."""
    raw = resolve_paths(read_document(path), path.absolute().parent, source_keys)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError([f"base: {base!r} should be the path of a config, relative to the folder of {path}"])
    if path.resolve() in above:
        raise ConfigError([f"base: {path} builds on itself"])
    return build_on(_read_with_base(path.parent / base, source_keys, (*above, path.resolve())), raw)


def _tracking_faults(tracking: TrackingConfig) -> list[str]:
    """Trackers that are asked for and not installed."""
    asked = {"tensorboard": tracking.tensorboard is True, "mlflow": tracking.mlflow, "wandb": tracking.wandb}
    return [
        f"tracking.{name}: {name} is not installed: pip install 'pukd_ray[{name}]'"
        for name, wanted in asked.items()
        if wanted and find_spec(name) is None
    ]


def _source_keys(kind: Any) -> list[str]:
    """Keys of a class of configs that hold sources."""
    hints = get_type_hints(kind, include_extras=True)
    return [key for key, hint in hints.items() if hint in (Sources, Sources | None)]


def _worker_faults(raw: dict[str, Any], at_fault: set[str]) -> list[str]:
    """The check across sections, where faults elsewhere kept the config from being put together."""
    keys = {"resources": "train_workers", "selector": "batch_size", "distill": "batch_size"}
    defaults = {"resources": ResourcesConfig(), "selector": SelectorConfig(), "distill": DistillConfig()}
    sections = {name: raw.get(name, {}) for name in keys}
    if any(not isinstance(sections[n], dict) or f"{n}.{key}" in at_fault for n, key in keys.items()):
        return []
    workers, selector, distill = (sections[n].get(key, getattr(defaults[n], key)) for n, key in keys.items())
    return worker_faults(workers, selector, distill)
