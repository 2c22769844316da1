"""What a config names and is not in it: paths made absolute, files of class names, files and networks that must be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from pukd_ray.config import (
    NEEDED_BY_FORMATS,
    RENORMALISING,
    ConfigError,
    ExportConfig,
    RunConfig,
    StudentConfig,
)
from pukd_ray.corpus.sources import check_reachable, sources_by_role, split_glob
from pukd_ray.storage import is_local, local_path, open_storage, read_bytes, split_uri

if TYPE_CHECKING:
    from pukd_ray.networks.found import Checkpoint


def resolve_paths(raw: dict[str, Any], base: Path, source_keys: Sequence[str]) -> dict[str, Any]:
    """`raw` with local paths of sources and of the teacher's files absolute: relative ones start at `base`."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(v) for v in value]
        if not isinstance(value, str) or not value or not is_local(value):
            return value
        path = local_path(value) if value.startswith("file:///") else Path(value.removeprefix("file://")).expanduser()
        return os.path.normpath(base / path)

    def source(value: Any) -> Any:
        if isinstance(value, list):
            return [source(v) for v in value]
        return {**value, "uri": absolute(value["uri"])} if isinstance(value, dict) and "uri" in value else value

    raw = {key: source(value) if key in source_keys else value for key, value in raw.items()}
    if "start" in raw:
        raw["start"] = absolute(raw["start"])
    teacher, student = raw.get("teacher"), raw.get("student")
    if isinstance(teacher, dict):
        raw["teacher"] = {
            k: absolute(v) if k == "weights" or (k == "classes" and isinstance(v, str)) else v
            for k, v in teacher.items()
        }
    if isinstance(student, dict) and "start" in student:
        raw["student"] = student | {"start": absolute(student["start"])}
    return raw


def read_class_names(raw: dict[str, Any]) -> list[str]:
    """Replace a file of class names by its names, so that the resolved config stands alone; returns the faults."""
    teacher = raw.get("teacher")
    if not isinstance(teacher, dict) or not isinstance(teacher.get("classes"), str):
        return []
    try:
        text = read_bytes(*open_storage(teacher["classes"])).decode()
    except (OSError, ValueError) as error:
        fault = f"teacher.classes: cannot read {teacher['classes']}: {error}"
        teacher["classes"] = None
        return [fault]
    teacher["classes"] = [line.strip() for line in text.splitlines() if line.strip()]
    return []


def file_exists(uri: str) -> bool:
    """Whether the file is there, or its storage cannot tell: reading it then says why."""
    try:
        fs, path = open_storage(uri)
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)
    except (ValueError, OSError):
        return True


def export_faults(export: ExportConfig) -> list[str]:
    """Packages of its formats that are not installed."""
    needed = {name: extra for chosen in export.formats for name, extra in NEEDED_BY_FORMATS[chosen].items()}
    if missing := {name: extra for name, extra in needed.items() if find_spec(name) is None}:
        extras = ",".join(dict.fromkeys(missing.values()))
        return [f"export.formats: needs {', '.join(missing)}, not installed here: pip install 'pukd_ray[{extras}]'"]
    return []


def file_faults(
    raw: dict[str, Any], at_fault: set[str], source_keys: Sequence[str], *, writes_teacher: bool, has_student: bool
) -> list[str]:
    """Faults of files, for every part of the config that is well-formed enough to say which files it means.

    `at_fault` are the keys that are known to be; `writes_teacher`: `teacher.weights` is yet to be written.
    """

    def sound(section: Any, key: str, *names: str) -> bool:
        return isinstance(section, dict) and not any(
            fault == f"{key}.{name}" or fault.startswith(f"{key}.{name}.") for name in names for fault in at_fault
        )

    faults: list[str] = []
    for role in source_keys:
        many = raw[role] if isinstance(raw.get(role), list) else [raw.get(role)]
        for index, source in enumerate(many):
            key = f"{role}.{index}" if isinstance(raw.get(role), list) else role
            if sound(source, key, "uri"):
                uri = source["uri"]
                faults += check_reachable(tuple(uri) if isinstance(uri, list) else (uri,), key)
    teacher: Any = raw.get("teacher")
    student: Any = raw.get("student", {})
    weights = teacher["weights"] if sound(teacher, "teacher", "weights") else None
    # A training writes these, and may begin with others.
    key, uri = ("start", raw.get("start")) if writes_teacher else ("teacher.weights", weights)
    checkpoint = None
    if writes_teacher and weights is not None:
        faults += _destination_faults(weights)
    if uri is not None and key not in at_fault:
        checkpoint, weights_faults = _read_weights(key, uri)
        faults += weights_faults
    if not sound(teacher, "teacher", "num_classes", "channels", "input_size"):
        return faults
    numbers = {k: teacher.get(k, 3) for k in ("num_classes", "channels", "input_size")}  # channels has a default
    if sound(teacher, "teacher", "arch"):
        where = f"{key}: {uri}"
        faults += _network_faults("teacher", teacher["arch"], numbers, checkpoint, where, begins=writes_teacher)
        if checkpoint and teacher["arch"] in RENORMALISING and teacher.get("transform_input") is None:
            _tell(
                f"warning: teacher.transform_input is not set, and {teacher['arch']} has such a switch, which weights "
                "do not tell: true if they were trained with it, as torchvision's own of ImageNet; taken for false"
            )
    if has_student and sound(student, "student", "arch"):
        begun = None
        if student.get("start") is not None and sound(student, "student", "start"):
            begun, start_faults = _read_weights("student.start", student["start"])
            faults += start_faults
        arch, where = student.get("arch", StudentConfig().arch), f"student.start: {student.get('start')}"
        faults += _network_faults("student", arch, numbers, begun, where, begins=True)
    return faults


def output_faults(config: RunConfig) -> list[str]:
    """An output below a folder that is read: the next start would take the run's own files for images."""

    def parts(uri: str) -> tuple[str, ...]:
        scheme, path, _ = split_uri(uri)
        return local_path(uri).parts if is_local(uri) else (scheme, *path.strip("/").split("/"))

    output = parts(config.output)
    faults = []
    for role, sources in sources_by_role(config).items():
        for uri in (uri for source in sources for uri in source.uris):
            folder, pattern = split_glob(uri)
            mine = parts(folder)
            if output[: len(mine)] != mine or (pattern is not None and not pattern.startswith("**")):
                continue
            if not any(name.startswith((".", "_")) for name in output[len(mine) :]):  # nobody lists what is hidden
                faults.append(f"output: {config.output} is below {role}.uri, {folder}: name a folder outside it")
    return faults


def check_folder(key: str, folder: Path) -> None:
    """ConfigError if a local folder can be neither made nor written into; makes nothing. `key`: what names it."""
    if above := _in_the_way(folder):
        raise ConfigError(
            [
                f"{key} {folder} cannot be written into, for {above} is no folder that this user may write to: name "
                "another"
            ]
        )


def _in_the_way(folder: Path) -> Path | None:
    """What is there of the path, unless it is a folder that this user may write to."""
    above = next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
    return None if above.is_dir() and os.access(above, os.W_OK | os.X_OK) else above


def _destination_faults(uri: Any) -> list[str]:
    """Of weights that are to be written: what can be told of that before hours of training."""
    try:
        open_storage(uri)
        above = _in_the_way(local_path(uri).parent) if is_local(uri) else None
    except (ValueError, OSError) as error:
        return [f"teacher.weights: {error}"]
    if above:
        return [f"teacher.weights: {uri} cannot be written, for {above} is no folder that this user may write to"]
    return []


def _read_weights(key: str, uri: str) -> tuple[Checkpoint | None, list[str]]:
    from pukd_ray.networks.found import read_checkpoint  # torch takes seconds: only once there is something to check

    try:
        data = read_bytes(*open_storage(uri))
    except FileNotFoundError:
        return None, [f"{key}: no such file: {uri}"]
    except (OSError, ValueError) as error:
        return None, [f"{key}: cannot read {uri}: {error}"]
    try:
        return read_checkpoint(data), []
    except ValueError as error:
        return None, [f"{key}: {uri} {error}"]


def _network_faults(
    section: str,
    arch: str,
    numbers: dict[str, int],
    checkpoint: Checkpoint | None = None,
    where: str = "",
    *,
    begins: bool = False,
) -> list[str]:
    """Faults of a network and, if there is a `checkpoint`, of the weights that are to fit it; says what is taken of it.

    `where` the checkpoint is: its key and file. `begins`: a training begins with it, maybe with another classifier.
    """
    from pukd_ray.networks.zoo import find_start, find_weights, outline_network

    try:
        network = outline_network(arch, **numbers)
    except ValueError as error:
        return [f"{section}.arch: {error}"]
    if checkpoint is None:
        return []
    try:
        shape = {key: numbers[key] for key in ("channels", "input_size")}
        content = checkpoint.content
        found = find_start(network, content, arch, **shape) if begins else find_weights(network, content)
    except ValueError as fault:
        return [f"{where}, arch {arch}: {fault}"]
    said = [f"taken {found.taken}"] * bool(found.taken)
    said += [f"not made: objects of {', '.join(checkpoint.skipped[:3])}"] * bool(checkpoint.skipped)
    if said:
        _tell(f"weights   {where}: {'; '.join(said)}")
    return []


def _tell(line: str) -> None:
    from pukd_ray.runtime.console import say  # imports Ray

    say(line)
