"""Labels of a run's audits: pooled for the prior, and what they make of P."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pukd_ray import ConfigError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import LabelsRecord
from pukd_ray.selection.labels import LABELS, LABELS_SCHEMA, load_labels, pool_priors, save_labels, stand_in
from pukd_ray.selection.verdict import LabelledPrior, audited


def record(audit: str = "a", images: int = 100, labelled: int = 50, prior: float | None = 0.2) -> LabelsRecord:
    told = prior is not None
    return {
        "audit": audit, "images": images, "labelled": labelled, "prior": prior, "lower": 0.1 if told else None,
        "upper": 0.4 if told else None, "reason": None if told else "3 of the 6 strata have no label",
    }  # fmt: skip


def table(relevant: dict[str, bool], weight: float = 2.0) -> pa.Table:
    rows = [{"image_id": i, "relevant": r, "weight": weight, "teacher_label": 1, "image": b""}
            for i, r in relevant.items()]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=LABELS_SCHEMA)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def test_without_labels_that_tell_the_prior_the_config_is_at_fault(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"selector.prior: audit needs labels, .* `pukd audit draw`"):
        load_labels(folder, 100)
    save_labels(folder, record(prior=None), table({"x": True}))
    with pytest.raises(ConfigError, match="do not tell the prior: 3 of the 6 strata have no label"):
        load_labels(folder, 100)


def test_labels_of_all_audits_are_kept_and_weigh_as_one_sample(folder: RunFolder) -> None:
    save_labels(folder, record("a", labelled=50), table({"x": True, "y": False, "z": True}))
    save_labels(folder, record("b", labelled=150), table({"x": True, "z": False, "w": True}, weight=4.0))
    found = load_labels(folder, 100)
    rows = {r["image_id"]: (r["relevant"], r["weight"]) for r in found.table.to_pylist()}
    assert rows == {"x": (True, 0.25 * 2 + 0.75 * 4), "y": (False, 0.5), "w": (True, 3.0)}  # z: people disagree
    assert found.prior.labelled == 200
    assert found.prior.reasons == ()
    save_labels(folder, record("b", labelled=150), table({"w": True}))  # read back again
    assert load_labels(folder, 100).table.num_rows == 4


def test_an_audit_of_a_smaller_corpus_gives_labels_and_no_prior(folder: RunFolder) -> None:
    save_labels(folder, record("a", images=80, prior=0.9), table({"x": True}))
    before = load_labels(folder, 100)
    assert before.prior.value == 0.9
    assert before.prior.reasons == ("the audit is of 80 images, the corpus has 100 now",)
    assert "has 100 now" in audited(before.prior).reasons[0]
    save_labels(folder, record("b", images=100), table({"y": True}))
    found = load_labels(folder, 100)
    assert (found.prior.value, found.prior.reasons) == (0.2, ())
    assert dict(zip(*(found.table.column(c).to_pylist() for c in ("image_id", "weight")), strict=True)) == {
        "x": 0.0, "y": 2.0
    }  # fmt: skip


def test_pooled_intervals_hold_the_truth() -> None:
    """Two binomial audits of unequal size, each with its normal interval."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        records = []
        for n in (100, 300):
            p = rng.binomial(n, 0.3) / n
            half = 1.645 * np.sqrt(p * (1 - p) / n)
            records.append(record(labelled=n, prior=p) | {"lower": p - half, "upper": p + half})
        pooled = pool_priors(records)  # type: ignore[arg-type]
        hits += pooled.lower <= 0.3 <= pooled.upper
        assert pooled.upper - pooled.lower < records[1]["upper"] - records[1]["lower"]
    assert 870 <= hits <= 930


@pytest.mark.parametrize(
    ("prior", "trusted"),
    [
        (LabelledPrior(0.25, 0.2, 0.3, 300), True),
        (LabelledPrior(0.25, 0.2, 0.3, 60), False),
        (LabelledPrior(0.02, 0.01, 0.06, 300), False),
    ],
)
def test_few_labels_are_not_trusted(prior: LabelledPrior, trusted: bool) -> None:
    verdict = audited(prior)
    assert (verdict.prior, verdict.lower, verdict.upper, verdict.train) == (
        prior.value,
        prior.lower,
        prior.upper,
        prior.value,
    )
    assert verdict.estimator == "audit"
    assert verdict.has_gap
    assert (verdict.reasons == ()) == trusted


def test_labelled_images_stand_for_the_relevant_ones_if_there_are_enough() -> None:
    units, rows = np.array(["own"] * 5 + [LABELS] * 40), np.r_[np.arange(5), np.arange(0, 80, 2)]
    weights = stand_in(units, rows, np.tile([2.0, 9.0], 40))
    assert weights is not None
    np.testing.assert_allclose(weights, np.r_[np.zeros(5), np.full(40, 45 / 40)])
    assert stand_in(units[:20], rows[:20], np.ones(80)) is None
    assert stand_in(units[:5], rows[:5], np.ones(80)) is None
