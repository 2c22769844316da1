"""How long a run still takes: what `pukd estimate` said of its stages, less what is done of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pukd_ray.run.records import EstimateRecord
from pukd_ray.run.stages import STAGE_NAMES


def expected_seconds(found: EstimateRecord | None) -> dict[str, float]:
    """By stage, as `pukd estimate` found for this run; empty without it."""
    if found is None:
        return {}
    stages = {part: s for part, s in found["seconds"].items() if part in STAGE_NAMES}
    # The estimate has stage `selector` in parts of other names.
    return stages | {"selector": sum(found["seconds"].values()) - sum(stages.values())}


def seconds_left(stages: Iterable[str], expected: Mapping[str, float], done: Mapping[str, float]) -> float | None:
    """Seconds that `stages` take, less the share that is `done` of each; None without an estimate."""
    if not expected:
        return None
    return sum(expected.get(stage, 0.0) * (1 - done.get(stage, 0.0)) for stage in stages)


def duration(seconds: float) -> str:
    """`75 s`, `12.5 min` or `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
