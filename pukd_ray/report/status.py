"""How far a run is, from its folder alone: read on any machine that reaches it, without Ray, config or weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pukd_ray.errors import RunError
from pukd_ray.run.ahead import duration, expected_seconds, seconds_left
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.lease import LAPSE_SECONDS, find_lease
from pukd_ray.run.records import ESTIMATE, DoingRecord, LeaseRecord, StageMarker
from pukd_ray.run.stages import STAGES
from pukd_ray.selection.chunks import chunk_markers


def status_lines(folder: RunFolder) -> list[str]:
    """The driver, each stage, what is left by `pukd estimate`, and why the last attempt failed.

    RunError if the folder holds no run.
    """
    lease = find_lease(folder)
    markers = {stage.name: folder.marker(stage.name) for stage in STAGES}
    if lease is None and not any(markers.values()):
        raise RunError(f"{folder.display}: holds no run: give the `output` of its config")
    expected = expected_seconds(folder.find_record(ESTIMATE))
    chunks = [] if markers["score"] else chunk_markers(folder)
    done = {"score": _share_scored(chunks, markers["plan"])}
    doing = (lease.get("doing") if _is_alive(lease) else None) if lease else None
    lines = [f"run       {folder.display}"]
    if lease is not None:
        lines.append(f"driver    {_driver(lease)}")
    pending = []
    for stage in STAGES:
        against = f", estimated {duration(expected[stage.name])}" if stage.name in expected else ""
        marker = markers[stage.name]
        if stage.asked_by and marker is None and not (doing and doing["stage"] == stage.name):
            continue  # not asked for, or not begun
        if marker is not None:
            text = f"done in {duration(marker['seconds'])}{against}: {_counts(marker)}".rstrip(": ")
        else:
            pending.append(stage.name)
            text = f"to do{against}"
            if stage.name == "score" and chunks:
                text += f"; {_scored(chunks, markers['plan'])}"
            if doing is not None and doing["stage"] == stage.name:
                text = f"at work for {duration(doing['seconds'])}{against}: {_bar(doing)}".rstrip(": ")
        lines.append(f"{stage.name:<9} {text}")
    left = seconds_left(pending, expected, done)
    if doing is not None:
        left = doing["seconds_left_in_all"]
    if pending and left is not None:
        lines.append(f"left      about {duration(left)} in all, by the estimate")
    elif pending:
        lines.append("left      not known: `pukd estimate`, before a run, tells")
    for name in pending:
        attempts = folder.attempts(name)
        if attempts is not None and (error := attempts.get("error")):
            lines.append(f"error     {name} failed at {attempts.get('failed')}: {error}")
    return lines


def _silence(lease: LeaseRecord) -> float:
    """Seconds since the holder was last heard of, by this machine's clock."""
    return (datetime.now(UTC) - datetime.fromisoformat(lease["last_beat"])).total_seconds()


def _is_alive(lease: LeaseRecord) -> bool:
    return not lease["released"] and _silence(lease) < LAPSE_SECONDS


def _driver(lease: LeaseRecord) -> str:
    who = f"process {lease['pid']} on {lease['host']}, since {lease['since']}"
    if lease["released"]:
        return f"none; the last was {who}"
    if _is_alive(lease):
        return f"{who}, last heard of {duration(max(0.0, _silence(lease)))} ago"
    return (
        f"{who}, silent for {duration(_silence(lease))} by this machine's clock: it is likely gone; the same command "
        "again goes on"
    )


def _planned(plan: StageMarker | None) -> int:
    return int(plan["counts"].get("corpus", 0)) if plan else 0


def _share_scored(chunks: Sequence[Mapping[str, Any]], plan: StageMarker | None) -> float:
    return float(min(1.0, sum(chunk["n_rows"] for chunk in chunks) / max(1, _planned(plan))))


def _scored(chunks: Sequence[Mapping[str, Any]], plan: StageMarker | None) -> str:
    """A chunk that is not done counts nothing; how many there will be depends on how fast they are."""
    rows = sum(chunk["n_rows"] for chunk in chunks)
    share = _share_scored(chunks, plan)
    chunks_in_all = f" of about {max(len(chunks), round(len(chunks) / share)):,}" if share else ""
    return f"{rows:,} of {_planned(plan):,} images are scored, in {len(chunks):,}{chunks_in_all} chunks"


def _bar(doing: DoingRecord) -> str:
    parts = []
    if doing["unit"]:
        total = "" if doing["total"] is None else f" of {doing['total']:,.0f}"
        part = "" if doing["part"] == doing["stage"] else f"{doing['part']} "
        parts.append(f"{part}{doing['done']:,.0f}{total} {doing['unit']}")
    if doing["seconds_left"] is not None:
        parts.append(f"about {duration(doing['seconds_left'])} left")
    return ", ".join(parts)


def _counts(marker: StageMarker) -> str:
    whole = {k: v for k, v in marker["counts"].items() if isinstance(v, int) and not isinstance(v, bool)}
    return ", ".join(f"{name.removeprefix('n_')} {value:,}" for name, value in whole.items())
