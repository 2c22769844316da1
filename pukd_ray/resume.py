"""What is still to do: the run's markers compared with its config, weights and files, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pukd_ray.config import ConfigError, RunConfig, to_plain
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.listing import Drift, Listing, compare_listing, list_inputs, read_files
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.run.folder import RETIRING, RunFolder, changed_inputs
from pukd_ray.run.records import StageMarker
from pukd_ray.run.stages import STAGE_NAMES, STAGES, Stage, stages_from
from pukd_ray.runtime.console import say
from pukd_ray.selection.chunks import lacks_hashes, missing_column, missing_columns, rules_of_pass
from pukd_ray.storage import read_file

LINKS = {"format.links": 2}
"""Input of a plan that counts links in tars as rows; no input of older ones."""


class StaleResultsError(ConfigError):
    """The folder holds results of another config, other weights or other files; `changed` has a line for each."""

    def __init__(self, changed: list[str], advice: str) -> None:
        super().__init__([*changed, advice])
        self.changed = changed


@dataclass(frozen=True)
class Progress:
    """What is to do."""

    pending: tuple[Stage, ...]
    inputs: dict[str, dict[str, Any]]
    """By stage: what its result depends on, for its marker."""
    listing: Listing
    weights: bytes
    """The teacher's, read once."""
    gone: frozenset[str] = frozenset()
    """URIs of corpus files that are no longer listed: what is not scored of them becomes unreadable rows."""


def fingerprints(config: RunConfig, weights: bytes) -> dict[str, dict[str, Any]]:
    """What each stage's result depends on: config keys, SHA-256 of `weights`, the teacher's, and of
    the file `student.start`, the format version of its files."""
    plain = to_plain(config)
    for source in (s for role in ("positives", "corpus", "test") for s in plain[role] or ()):
        del source["follow_links"]  # what it changes is in the listing
    inputs: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = {}
    for stage in STAGES:
        if not stage.is_asked(config):
            continue
        mine = {k: v for key in stage.depends_on for k, v in _flatten(key, _lookup(plain, key)).items()}
        mine = {k: v for k, v in mine.items() if k not in stage.except_for}
        if "teacher" in stage.depends_on:
            mine["teacher.weights"] = hashlib.sha256(weights).hexdigest()
        if mine.get("student.start"):
            mine["student.start"] = hashlib.sha256(read_file(mine["student.start"])).hexdigest()
        inputs[stage.name] = known | mine | {f"format.{stage.name}": stage.format_version}
        if stage.name == "plan":
            inputs["plan"] |= LINKS
        if stage.asked_by is None:
            known = inputs[stage.name]
    return inputs


def _lookup(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flatten(f"{prefix}.{name}", inner).items()}


def check_progress(
    folder: RunFolder,
    config: RunConfig,
    redo: str | None,
    stages: Sequence[Stage],
    take: Callable[[], object] = lambda: None,
    *,
    dry: bool = False,
) -> Progress:
    """What of `stages` is to do; moves aside what `redo`, or a corpus that has grown, makes obsolete, after `take()`.

    If `dry` it only says what it would move.
    StaleResultsError if the folder's results are of other inputs and no `redo` covers it.
    """
    if folder.exists(RETIRING) and not dry:  # a driver died while it moved: its stages are neither here nor there
        take()
        say(f"          earlier results that a stopped run began to move are moved to {folder.retire_on()}")
    weights = read_file(config.teacher.weights)
    inputs = fingerprints(config, weights)
    listing = list_inputs(sources_by_role(config))
    markers = {name: marker for name in STAGE_NAMES if (marker := folder.marker(name)) is not None}
    done, plan = set(markers), markers.get("plan")
    stale = _changed_keys(folder, config, inputs)
    drift = Drift(0, ())
    if plan is not None and not LINKS.keys() <= plan["inputs"].keys() and _counts_links(listing):
        stale.setdefault("plan", []).append(
            f"output: {folder.display} was planned by a version that did not count links in tars: rows are others now"
        )
    if "plan" in done and "plan" not in stale:
        drift = compare_listing(read_files(folder), listing.table)
    if drift.faults:
        stale["plan"] = [*stale.get("plan", []), *drift.faults]
    first = next((name for name in STAGE_NAMES if name in stale), None)
    if first and (redo is None or STAGE_NAMES.index(redo) > STAGE_NAMES.index(first)):
        raise _stale_results(folder, first, stale[first])
    selector_is_due = "selector" not in done or (
        redo is not None and "selector" in {stage.name for stage in stages_from(redo)}
    )
    if config.selector.prior == "audit" and selector_is_due:  # before anything is moved
        from pukd_ray.selection.labels import load_labels  # torch comes with it

        load_labels(folder, 0)
    if redo is not None:
        again = stages_from(redo)
        if there := [stage.name for stage in again if _has_results(folder, [stage])]:
            names = ", ".join(there)
            say(f"          {names}: earlier results {_move(folder, again, take, dry)}")
        done -= {stage.name for stage in again}
    gone = frozenset[str]() if redo == "plan" else drift.gone
    if gone:
        say(
            f"          warning: {len(gone)} files of the corpus are gone since it was planned, such as {min(gone)}: "
            "what is not scored of them becomes unreadable rows (--redo plan plans without them)"
        )
    is_unscored = {"plan", "score"} <= done and _is_unscored(markers["plan"], markers["score"])
    if (drift.added or is_unscored) and redo != "plan":
        grown = stages_from("select")
        what = f"the corpus has {drift.added} new files" if drift.added else "files were new when this run was stopped"
        if _has_results(folder, grown):
            moved = _move(folder, grown, take, dry)
            say(f"          {what}: only they are scored; what was made without them {moved}")
        if plan is not None and not dry:
            take()
            folder.write_json("markers/plan.json", {**plan, "grows": True})
        done -= {"plan", "score", *(stage.name for stage in grown)}
    for stage in stages:
        later = stages_from(stage.name)[1:]
        if stage.asked_by and stage.is_asked(config) and stage.name not in done and done & {s.name for s in later}:
            say(f"          {stage.name} is new to this run: the page without it {_move(folder, later, take, dry)}")
            done -= {s.name for s in later}
    pending = tuple(stage for stage in stages if stage.name not in done and stage.is_asked(config))
    return Progress(pending, inputs, listing, weights, gone)


def _counts_links(listing: Listing) -> bool:
    return any(FORMATS[name].counts_links for name in pc.unique(listing.table.column("format")).to_pylist())


def _is_unscored(planned: StageMarker, scored: StageMarker) -> bool:
    """Whether a run that grew was stopped before all of it was scored: the score's marker is of fewer images."""
    there = planned["counts"].get("corpus")
    return planned.get("grows", False) or scored["counts"].get("n_corpus", there) != there


def _move(folder: RunFolder, stages: Sequence[Stage], take: Callable[[], object], dry: bool) -> str:
    """Retire what `stages` left, after `take()`; where it went, or would go."""
    if dry:
        return "would move to old/"
    take()
    return f"moved to {folder.retire(stages)}"


def check_unchanged(folder: RunFolder, config: RunConfig) -> None:
    """StaleResultsError if the folder's results are of other keys or weights; looks at no listing, moves nothing.

    For those who only read a run: results of earlier versions are fine.
    """
    stale = _changed_keys(folder, config, fingerprints(config, read_file(config.teacher.weights)))
    for first in STAGE_NAMES:
        if keys := [key for key in stale.get(first, []) if not key.startswith("format.")]:
            raise _stale_results(folder, first, keys)


def _changed_keys(folder: RunFolder, config: RunConfig, inputs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """By stage: the keys in which what it was made with, or began with, differs from what it would be made with."""
    changed: dict[str, list[str]] = {}
    for stage in STAGES:
        if stage.name not in inputs:
            continue
        marker = folder.marker(stage.name)
        before = marker["inputs"] if marker is not None else None
        if before is None and stage.resumable:
            before = folder.read_json(f"markers/{stage.name}.inputs.json")
        if before is not None:
            keys = changed_inputs(LINKS | before, inputs[stage.name])
            changed |= {stage.name: keys} if keys else {}
    for rule in missing_columns(folder, rules_of_pass(config)):  # columns that are there and not asked for do no harm
        key = "selection.rule" if rule == config.selection.rule else "score.also"
        changed.setdefault("score", []).append(f"{key}: {missing_column(folder, rule)}")
    if config.selection.deduplicate == "near" and lacks_hashes(folder):
        lack = f"the scores in {folder.display}, of an earlier version, have no hashes to find near-copies by"
        changed.setdefault("score", []).append(f"selection.deduplicate: {lack}: --redo score makes them")
    return changed


def _has_results(folder: RunFolder, stages: Sequence[Stage]) -> bool:
    return any(folder.has_outputs(stage) or folder.marker(stage.name) is not None for stage in stages)


def _stale_results(folder: RunFolder, first: str, keys: list[str]) -> StaleResultsError:
    there = [stage.name for stage in stages_from(first) if _has_results(folder, [stage])]
    changed = [
        key if ":" in key else f"{key}: has changed since stage {first} of {folder.display} was done" for key in keys
    ]
    return StaleResultsError(
        changed,
        f"output: results of {', '.join(there)} are there; --redo {first} moves them to old/ and does "
        "these stages again, or choose another output",
    )
