"""Whether images that were added after the selector was trained are like those that it was trained for.

Prior, calibration and estimates are of the sample, and the sample is of the corpus as it was then. What is scored later
is compared with it: the scores' distribution at fixed thresholds (the distance of Kolmogorov and Smirnov), the share
that the calibration takes for relevant, the share of unreadable images. Files that were there already need no look: the
sample was drawn from them, whatever order they are scored in.

Images of one file are alike, so files are what is counted (where the sample has only few, units): a share's variance is
p (1 - p) sum_i n_i (1 + (n_i - 1) rho) / N^2 (Kish's design effect). The correlation rho of images of one file comes
from how the files on either side spread around their own mean; few files tell little of it, so an upper bound is taken,
by the chi-square distribution of a variance. Where either side is one file nothing is known, and rho counts as 0.

A drift is reported where a difference is both beyond chance and large enough to matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa

from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import (
    ChunkDrift,
    DriftFigures,
    DriftRecord,
    PriorRecord,
    RecordFile,
    ReferenceRecord,
    TallyRecord,
    TrustRecord,
)
from pukd_ray.selection.calibration import Calibration

FALSE_ALARMS = 0.005
"""Chance of one in a whole run, for each of two looks: at each chunk, and at all chunks so far."""
DOUBT = 0.1
"""Chance that rho is above its bound."""
DISTANCE = 0.1
"""Between the distribution functions of the scores, that matters."""
RATIO = 1.5
"""Between the shares that look relevant, either way, that matters."""
REJECTED = 0.05
"""Between the shares of unreadable images, that matters."""
FEW_FILES = 10
"""Below so many in the sample, units are taken for independent."""


@dataclass(frozen=True)
class Tally:
    """Groups of images summed up: enough for shares, and for how these spread from group to group.

    Counted (K) are images above each threshold, their P(relevant) summed up, and unreadable ones.
    """

    groups: int
    rows: float
    rows_squared: float
    """Sum over groups of the square of their rows, as the following."""
    counts: np.ndarray
    """[K]."""
    counts_squared: np.ndarray
    counts_rows: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, rows: np.ndarray) -> Tally:
        """Of counts [groups, K] and rows [groups]."""
        c, n = np.asarray(counts, np.float64), np.asarray(rows, np.float64)
        return cls(len(n), float(n.sum()), float(n @ n), c.sum(0), (c**2).sum(0), n @ c)

    def __add__(self, other: Tally) -> Tally:
        """Both."""
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def shares(self) -> np.ndarray:
        """[K]."""
        return self.counts / self.rows

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """(variance of the counts between two or more groups, what independent images would have), both [K]."""
        p, m = self.shares, self.groups
        around = self.counts_squared - 2 * p * self.counts_rows + p**2 * self.rows_squared
        return around * m / (m - 1), p * (1 - p) * self.rows

    def to_json(self) -> TallyRecord:
        """Inverse of `from_json`."""
        return {
            "groups": self.groups,
            "rows": self.rows,
            "rows_squared": self.rows_squared,
            "counts": self.counts.tolist(),
            "counts_squared": self.counts_squared.tolist(),
            "counts_rows": self.counts_rows.tolist(),
        }

    @classmethod
    def from_json(cls, saved: TallyRecord) -> Tally:
        """Of a chunk's marker, or of the reference."""
        values = {name: np.array(v) if isinstance(v, list) else v for name, v in saved.items()}
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Comparison:
    """New images against the sample."""

    distance: float
    """Greatest difference between the shares above a threshold."""
    relevant: tuple[float, float]
    """Share that looks relevant, of the sample and of the new images."""
    rejected: tuple[float, float]
    reasons: tuple[str, ...]
    """Each a drift."""


def compare(sample: Tally, new: Tally, level: float = FALSE_ALARMS) -> Comparison:
    """What differs beyond a chance of `level` for all together, and by enough to matter."""
    from scipy.stats import norm

    a, b = sample.shares, new.shares
    p = (a + b) / 2
    rho = _correlation(sample, new)
    variance = p * (1 - p) * sum((t.rows + (t.rows_squared - t.rows) * rho) / t.rows**2 for t in (sample, new))
    chance = 2 * norm.sf(np.abs(b - a) / np.sqrt(np.maximum(variance, 1e-300))) * len(p)
    sure = (chance < level) & (p > 0)
    difference = np.abs(b - a)[:-2]
    at = int(np.argmax(np.where(sure[:-2], difference, 0.0)))
    reasons = []
    if sure[-2] and not a[-2] / RATIO <= b[-2] <= a[-2] * RATIO:
        reasons.append(f"{b[-2]:.2%} look relevant, of the sample {a[-2]:.2%}")
    if sure[:-2][at] and difference[at] > DISTANCE:
        reasons.append(f"the scores' distribution is {difference[at]:.2f} away from the sample's")
    if sure[-1] and b[-1] - a[-1] > REJECTED:
        reasons.append(f"{b[-1]:.1%} cannot be read, of the sample {a[-1]:.1%}")
    relevant, rejected = ((float(a[k]), float(b[k])) for k in (-2, -1))
    return Comparison(float(difference.max()), relevant, rejected, tuple(reasons))


def _correlation(*tallies: Tally) -> np.ndarray:
    """Upper bound of the correlation of two images of one group, [K], from all tallies."""
    from scipy.stats import chi2

    found = np.zeros(len(tallies[0].counts))
    freedom, others = 0.0, 0.0
    for tally in tallies:
        beside = tally.rows_squared / tally.rows - 1  # images of its group beside an image
        if (free := tally.groups - 1) and beside > 0:
            between, alone = tally.spread()
            found += free * (between / np.maximum(alone, 1e-300) - 1) / beside
            freedom, others = freedom + free, others + free * beside
    if not freedom:
        return found
    others /= freedom
    effect = (1 + others * np.maximum(found / freedom, 0)) * freedom / chi2.ppf(DOUBT, freedom)
    bound: np.ndarray = np.clip((effect - 1) / others, 0, 1)
    return bound


def thresholds(logits: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """At most 14, ascending: deciles of the sample's logits [n], and five of its part that looks relevant, if small."""
    order = np.argsort(logits, kind="stable")
    mass = np.cumsum(probability[order])
    at = np.searchsorted(mass, mass[-1] * np.array([0.1, 0.25, 0.5, 0.75, 0.9])).clip(0, len(logits) - 1)
    deciles = np.quantile(logits, np.linspace(0.1, 0.9, 9))
    edges: np.ndarray = np.unique(np.r_[deciles, logits[order[at]]].astype(np.float64))
    return edges


def count_scores(logits: np.ndarray, probability: np.ndarray, rejected: int, edges: np.ndarray) -> np.ndarray:
    """What a `Tally` counts of some images, float64 [len(edges) + 2]: logits and P(relevant) of the readable ones."""
    above = (logits[:, None] > edges).sum(0)
    counts: np.ndarray = np.r_[above, probability.sum(dtype=np.float64), rejected].astype(np.float64)
    return counts


# -- of a run ---------------------------------------------------------------------------------------------------

REFERENCE = RecordFile[ReferenceRecord]("selector/reference.json")
KNOWN = "selector/units.parquet"
"""Units of the corpus that the sample was drawn from."""


@dataclass(frozen=True)
class Reference:
    """What new images are compared with."""

    edges: np.ndarray
    by_file: bool
    """Whether a file's units are one group."""
    tally: Tally
    known: frozenset[str]
    """Units that the sample was drawn from."""

    def group(self, unit: Unit) -> str:
        """Its file; itself where it is of many small files, or where the sample has few files."""
        return unit.files[0] if self.by_file and len(unit.files) == 1 else unit.unit_id

    def tally_of(self, units: Sequence[Unit], counts: Mapping[str, np.ndarray]) -> Tally | None:
        """Of those of `units` that are new, from what `count_scores` says of each; None if none is."""
        groups: dict[str, np.ndarray] = {}
        for unit in units:
            if unit.unit_id not in self.known:
                name = self.group(unit)
                groups[name] = groups.get(name, 0) + np.r_[counts[unit.unit_id], unit.rows]
        if not groups:
            return None
        table = np.stack(list(groups.values()))
        return Tally.of(table[:, :-1], table[:, -1])


def refer_to(
    units: Sequence[Unit], asked: Mapping[str, int], of_unit: np.ndarray, logits: np.ndarray, calibration: Calibration
) -> Reference:
    """The sample as a reference.

    Args:
        units: of the corpus that the sample was drawn from.
        asked: images that the sample asked for, by unit.
        of_unit: unit of each readable one, [n].
        logits: of the selector, float32 [n].
        calibration: of these.
    """
    probability = calibration(logits)
    edges = thresholds(logits, probability)
    by_file = len({unit.files[0] for unit in units if unit.unit_id in asked}) >= FEW_FILES
    empty = Reference(edges, by_file, Tally.of(np.zeros((0, len(edges) + 2)), np.zeros(0)), frozenset())
    order = np.argsort(of_unit, kind="stable")
    names, starts = np.unique(of_unit[order], return_index=True)
    rows = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    sampled = [replace(unit, rows=asked[unit.unit_id]) for unit in units if asked.get(unit.unit_id)]
    counts = {}
    for unit in sampled:
        mine = rows.get(unit.unit_id, order[:0])
        counts[unit.unit_id] = count_scores(logits[mine], probability[mine], unit.rows - len(mine), edges)
    tally = empty.tally_of(sampled, counts)
    assert tally is not None
    return replace(empty, tally=tally, known=frozenset(unit.unit_id for unit in units))


def save_reference(folder: RunFolder, reference: Reference) -> None:
    """Write it beside the selector."""
    folder.write_table(KNOWN, pa.table({"unit": sorted(reference.known)}))
    saved: ReferenceRecord = {
        "edges": reference.edges.tolist(),
        "by_file": reference.by_file,
        "tally": reference.tally.to_json(),
    }
    folder.write_record(REFERENCE, saved)


def load_reference(folder: RunFolder) -> Reference | None:
    """None of a selector of an earlier version."""
    saved = folder.find_record(REFERENCE)
    if saved is None:
        return None
    known = frozenset(folder.read_table(KNOWN).column("unit").to_pylist())
    return Reference(np.array(saved["edges"]), saved["by_file"], Tally.from_json(saved["tally"]), known)


def drift_of_chunks(reference: Reference | None, markers: Sequence[Mapping[str, Any]]) -> DriftRecord | None:
    """What the chunks' markers say of their new images; None without any, or with scores of an earlier version."""
    if reference is None:
        return None
    chunks = {m["chunk"]: Tally.from_json(new) for m in markers if (new := m.get("new")) is not None}
    return find_drift(reference.tally, chunks)


def describe_drift(drift: DriftRecord) -> str:
    """What a drift means, and what to do."""
    return (
        f"the {drift['images']:,} images of new files are not like the sample that the selector was trained on "
        f"({'; '.join(drift['reasons'])}): prior, precision and recall may be off; --redo selector trains it on all"
    )


def trust_with(drift: DriftRecord | None, prior: PriorRecord) -> TrustRecord:
    """In the selector's estimates for the corpus as it is now."""
    if drift is None or not drift["found"]:
        return {"level": prior["trust"], "reasons": prior["reasons"]}
    new = [f"new files are not like the sample: {reason}" for reason in drift["reasons"]]
    return {"level": "low" if prior["trust"] == "high" else prior["trust"], "reasons": [*prior["reasons"], *new]}


def find_drift(sample: Tally, chunks: Mapping[str, Tally]) -> DriftRecord | None:
    """All new images, and those of each chunk, against the sample; None if there are no new images."""
    if not chunks:
        return None
    found: list[ChunkDrift] = []
    apart: list[str] = []
    for number, (name, tally) in enumerate(chunks.items(), 1):
        level = FALSE_ALARMS / (number * (number + 1))  # of any number of looks the sum stays below FALSE_ALARMS
        chunk = compare(sample, tally, level)
        found.append({"chunk": name, **_figures(tally, chunk)})
        apart += [f"chunk {name}: {reason}" for reason in chunk.reasons]
    total = reduce(Tally.__add__, chunks.values())
    whole = compare(sample, total, level)
    reasons = list(whole.reasons) or apart
    return {**_figures(total, whole), "found": bool(reasons), "reasons": reasons, "chunks": found}


def _figures(tally: Tally, of: Comparison) -> DriftFigures:
    return {
        "images": round(tally.rows),
        "groups": tally.groups,
        "distance": of.distance,
        "relevant": of.relevant[1],
        "relevant_in_sample": of.relevant[0],
        "rejected": of.rejected[1],
        "rejected_in_sample": of.rejected[0],
    }
