"""Stage `score`: every corpus image once through teacher and selector, in chunks that survive crashes."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pukd_ray.config import RunConfig, TeacherConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.perceptual import hash_column, perceptual_hashes
from pukd_ray.corpus.reading import ReadRequest, content_hash
from pukd_ray.corpus.streaming import Pass, scatter_rows, stream
from pukd_ray.corpus.units import Unit
from pukd_ray.errors import RunError
from pukd_ray.networks.actor import TeacherActor
from pukd_ray.run.folder import RunFolder, scores_schema
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.devices import Precision
from pukd_ray.runtime.timing import Stopwatch, covered_seconds
from pukd_ray.selection.blend import Blend, Nearness
from pukd_ray.selection.calibration import Calibration, from_json, rescale_logits
from pukd_ray.selection.chunks import CHUNK_SECONDS, HASH_COLUMN, chunk_markers, rules_of_pass
from pukd_ray.selection.committing import ATTEMPTS, ChunkLedger, WriteScores, delete_unfinished, merge_attempt
from pukd_ray.selection.drift import describe_drift, drift_of_chunks, load_reference
from pukd_ray.selection.features import load_last_tap
from pukd_ray.selection.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

KEPT_OF_THE_REST = 1e-4


class ScoreImages(TeacherActor):
    """Decoded rows -> rows of `scores/`."""

    def __init__(
        self,
        teacher: TeacherConfig,
        weights: Shared,
        grid: int | Literal["auto"],
        precision: Precision,
        head: bytes,
        trunk: bytes | None,
        calibration: Calibration,
        keep: str,
        keep_above: float,
        fitted: Mapping[str, Shared],
        blend: tuple[Blend, Shared] | None,
    ) -> None:
        super().__init__(teacher, weights, grid, precision)
        from pukd_ray.networks.selector import load_head
        from pukd_ray.networks.teacher import Teacher

        loaded, self._log_max_phi = load_head(head)
        self._head = loaded.to(self.teacher.device)
        self._trunk = None if trunk is None else Teacher(teacher, trunk, self.teacher.device, grid, precision)
        self._blend = None if blend is None else (blend[0], Nearness.load(blend[1].get()))
        self._calibration, self._kept, self._keep_above = calibration, keep, keep_above
        self._fitted = {rule: arrays.get() for rule, arrays in fitted.items()}

    def columns(self, pixels: Tensor, precision: Precision | None = None) -> dict[str, Tensor]:
        """As `TeacherActor.columns`: the PU logit and the teacher's opinion; where rules have a scorer, also what it
        looks at. Features are those of the fine-tuned trunk, if there is one; all else is the teacher's."""
        from pukd_ray.networks.selector import as_cached
        from pukd_ray.networks.teacher import all_finite, teacher_opinion

        features, logits = self.teacher(pixels, precision)
        seen = features if self._trunk is None else self._trunk(pixels, precision)[0]
        found = {"finite": all_finite(features, seen, logits), "z": self._head(as_cached(seen).float())}
        found |= teacher_opinion(logits)
        if self._fitted or self._blend:
            found |= {"last_tap": as_cached(self.teacher.last_tap(features)), "logits": logits}
        return found

    def logits(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """PU logits float32 [n] of what `columns` found, blended with nearness to P if that is asked for."""
        z = rescale_logits(found["z"], self._log_max_phi)
        if self._blend is None or not len(z):
            return z
        blend, nearness = self._blend
        return blend(z, nearness.tails(found["last_tap"].astype(np.float32)))

    def work(self, table: pa.Table) -> pa.Table:
        """Same rows, with scores or the reason why there are none."""
        table, readable, pixels, found = self.forward(table)
        pu_logit = self.logits(found)
        probability = self._calibration(pu_logit).astype(np.float32)
        columns = {
            "pu_logit": scatter_rows(pu_logit, readable, pa.float32()),
            "pu_probability": scatter_rows(probability, readable, pa.float32()),
            "teacher_label": scatter_rows(found["teacher_label"], readable, pa.int32()),
            "teacher_confidence": scatter_rows(found["teacher_confidence"], readable, pa.float32()),
            "teacher_entropy": scatter_rows(found["teacher_entropy"], readable, pa.float32()),
            "perceptual_hash": hash_column(*perceptual_hashes(pixels), readable),
            **{rule: scatter_rows(self._scores(rule, found), readable, pa.float32()) for rule in self._fitted},
        }
        kept = np.zeros(len(readable), bool)
        if self._kept == "all":
            kept = readable
        elif self._kept == "likely":
            hashes = table.column("content_hash").filter(pa.array(readable)).to_numpy()
            sampled = hashes % 1_000_000 < KEPT_OF_THE_REST * 1_000_000
            kept[readable] = (probability >= self._keep_above) | sampled
        for name, column in columns.items():
            table = table.append_column(name, column)
        image = pc.if_else(pa.array(kept), table.column("image"), pa.scalar(None, pa.binary()))
        table = table.set_column(table.schema.get_field_index("image"), "image", image)
        return table.select([*scores_schema(list(self._fitted)).names, "unit"])

    def _scores(self, rule: str, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """A rule's own scores float32 [n] of what `columns` found."""
        scorer = RULES[rule].scorer
        assert scorer is not None
        if not len(found["z"]):
            return np.zeros(0, np.float32)
        return scorer.score(self._fitted[rule], found["last_tap"].astype(np.float32), found["logits"])


@ray.remote(num_cpus=1, num_returns=2)
def _fit_scorer(folder: RunFolder, files: list[str], rule: str) -> tuple[dict[str, np.ndarray], bool]:
    """(what the rule's scorer needs, True)."""
    scorer = RULES[rule].scorer
    assert scorer is not None
    return scorer.fit(*load_last_tap(folder, files)), True


def fit_scorers(folder: RunFolder, rules: Sequence[str]) -> dict[str, Shared]:
    """What the scorers of `rules` learnt from P and the sample of U, by rule; it stays in the object store."""
    files = folder.read_json("selector/features.json")["files"]
    fits = {rule: _fit_scorer.remote(folder, files, rule) for rule in rules}
    ray.get([done for _, done in fits.values()])  # one that fails does so here, not in every actor of the pass
    return {rule: Shared(fitted) for rule, (fitted, _) in fits.items()}


def _read_blend(folder: RunFolder) -> tuple[Blend, Shared]:
    nearness = folder.read_bytes("selector/nearness.npz")
    return Blend(**folder.read_json("selector/blend.json")), Shared.of(nearness)


def score_corpus(run: RunContext) -> dict[str, Any]:
    """Score the units that no finished chunk has; returns the counts over all chunks.

    RunError if more images are unreadable than `score.max_rejected` allows; RuntimeError if rows got lost.
    """
    folder, config = run.folder, run.config
    corpus = [u for u in run.units_of("corpus") if u.rows]
    markers = chunk_markers(folder)
    finished = {unit for marker in markers for unit in marker["units"]}
    pending = [u for u in corpus if u.unit_id not in finished]
    folder.delete_folder(ATTEMPTS)
    _check_rejected(config, markers)
    total, done = sum(u.rows for u in corpus), sum(u.rows for u in corpus if u.unit_id in finished)
    if finished and pending:
        say(f"          {done:,} of {total:,} images are scored already, in {len(markers)} chunks")
    calibration, _ = from_json(folder.read_json("selector/calibration.json"))
    rules = rules_of_pass(config)
    arguments = (
        config.teacher,
        run.weights,
        config.selector.grid,
        config.resources.precision,
        folder.read_bytes("selector/head.pt"),
        folder.read_bytes("selector/trunk.pt") if config.selector.trunk == "finetune" else None,
        calibration,
        config.score.keep_images,
        config.score.keep_above,
        fit_scorers(folder, rules) if pending else {},
        _read_blend(folder) if config.selector.blend else None,
    )
    reference = load_reference(folder)
    is_new = reference is not None and any(unit.unit_id not in reference.known for unit in pending)
    edges = reference.edges if reference is not None and is_new else None
    rate, warned = _first_rate(folder), False
    with progress("score", total, "images", done) as bar:
        while pending:
            size = config.score.chunk_images or max(1, int(rate * CHUNK_SECONDS))
            chunk, pending = _take(pending, size)
            name = f"{1 + max((int(marker['chunk']) for marker in markers), default=-1):05d}"
            attempt = f"{ATTEMPTS}/{name}-{uuid.uuid4().hex[:8]}"
            watch, ledger = Stopwatch(), ChunkLedger()
            work = Pass("score", ScoreImages, arguments, WriteScores(folder, attempt, rules, edges))
            for part in stream(run, work, [ReadRequest(u) for u in chunk]):
                bar.update(ledger.add(part))
            new = reference.tally_of(chunk, ledger.scores) if reference is not None and is_new else None
            marker: dict[str, Any] = {
                "chunk": name,
                "units": [u.unit_id for u in chunk],
                "files": merge_attempt(folder, name, chunk, ledger, rules),
                "columns": [HASH_COLUMN, *rules],
                "n_rows": ledger.rows.total(),
                "rejected_by_reason": dict(ledger.reasons),
                "new": None if new is None else new.to_json(),
                "seconds": round(watch.seconds, 3),
                "computing_seconds": round(covered_seconds(ledger.spans), 3),
            }
            _check_rejected(config, [*markers, marker])
            folder.commit_json(f"markers/score/{name}.json", marker)
            markers.append(marker)
            folder.delete_folder(attempt)
            rate = marker["n_rows"] / watch.seconds
            drift = drift_of_chunks(reference, markers)
            if drift is not None and drift["found"] and not warned:
                warned = True
                say(f"          warning: {describe_drift(drift)}")
    delete_unfinished(folder, markers)
    return summarise(markers)


def summarise(markers: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all finished chunks."""
    reasons: Counter[str] = Counter()
    for marker in markers:
        reasons.update(marker["rejected_by_reason"])
    n_rows, n_rejected = sum(m["n_rows"] for m in markers), sum(reasons.values())
    seconds = sum(m["seconds"] for m in markers)
    return {
        "n_corpus": n_rows,
        "n_scored": n_rows - n_rejected,
        "n_rejected": n_rejected,
        "rejected_by_reason": dict(sorted(reasons.items())),
        "images_per_second": round(n_rows / seconds, 2) if seconds else 0.0,
        "chunks": len(markers),
        "computing_seconds": round(sum(m["computing_seconds"] for m in markers), 3),
    }


def _first_rate(folder: RunFolder) -> float:
    features = folder.read_json("selector/features.json")
    return float(max(1.0, features["images"] / features["seconds"]))


def _take(pending: list[Unit], size: int) -> tuple[list[Unit], list[Unit]]:
    count, rows = 0, 0
    while count < len(pending) and (rows < size or not count):
        rows += pending[count].rows
        count += 1
    return pending[:count], pending[count:]


def _check_rejected(config: RunConfig, markers: list[dict[str, Any]]) -> None:
    counts = summarise(markers)
    if counts["n_corpus"] >= 100 and counts["n_rejected"] > config.score.max_rejected * counts["n_corpus"]:
        what = ", ".join(
            f"{n:,} {r}" for r, n in sorted(counts["rejected_by_reason"].items(), key=lambda kv: -kv[1])[:3]
        )
        raise RunError(
            f"corpus: {counts['n_rejected']:,} of {counts['n_corpus']:,} images are unreadable ({what}), more than "
            f"score.max_rejected = {config.score.max_rejected:g}: mend the files (those of finished chunks are looked "
            "at again by --redo score), or raise it and start again"
        )


def sort_key(seed: int, image_id: str) -> int:
    """Seeded 64-bit hash of an image id: the order in which training streams the selection."""
    return content_hash(f"{seed}/{image_id}".encode())


def keep_key(seed: int, image_id: str) -> int:
    """Seeded 64-bit hash of an image id: of equal images the lowest stays. Apart from `sort_key`, by which rules draw
    at random: pictures of which there are many copies would be drawn more seldom, or more often, than others."""
    return sort_key(seed, f"copies/{image_id}")
