"""What a selection rule is: who may be taken, in which order, and how many. Plain NumPy, no images, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.cuts import Scores, share_quota, unit_interval


@dataclass(frozen=True)
class Supply:
    """What there is to take from."""

    prior: float
    """Estimated share of relevant images."""
    n_scored: int
    """Readable images of the corpus."""
    probabilities: np.ndarray
    """Mean P(relevant) of bins of eligible rows by falling key, float64 [M]."""
    counts: np.ndarray
    """Rows of each bin, int64 [M]."""


def everyone(selection: SelectionConfig, scores: Scores) -> np.ndarray:
    """All True, bool [N]."""
    del selection
    return np.ones(len(scores.pu_logit), bool)


def positive_logit(selection: SelectionConfig, scores: Scores) -> np.ndarray:
    """Rows that the selector takes for relevant, bool [N]."""
    del selection
    return scores.pu_logit > 0


def by_logit(scores: Scores) -> np.ndarray:
    """`pu_logit`, float32 [N]."""
    return scores.pu_logit


def by_tie_breaker(scores: Scores) -> np.ndarray:
    """Random order, float32 [N] in [0, 1)."""
    return unit_interval(scores.tie_breaker)


def by_column(name: str) -> Callable[[Scores], np.ndarray]:
    """Further column `name` of the score table, float32 [N]."""

    def column(scores: Scores) -> np.ndarray:
        return scores.more[name]

    return column


def the_budget(selection: SelectionConfig, supply: Supply) -> int:
    """As many as `selection.budget` says."""
    del supply
    assert selection.budget is not None
    return selection.budget


@dataclass(frozen=True)
class Scorer:
    """How the pass computes a column of a rule's own, from the teacher's last tap, averaged over its grid cells.

    Both run on the cluster, where imports that take their time belong into the functions.
    """

    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    """(P float32 [n_p, C], sample of U [n_u, C], labels of P int64 [n_p]) -> what `score` needs."""
    score: Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray]
    """(what `fit` returned, images float32 [n, C], the teacher's logits for them [n, K]) -> float32 [n], finite."""


def moments(features: np.ndarray) -> dict[str, np.ndarray]:
    """`mean` and `std` float32 [C] of features [n, C] to standardise by; a dimension that never varies keeps its 1."""
    std = features.std(0, dtype=np.float64)
    return {
        "mean": features.mean(0, dtype=np.float64).astype(np.float32),
        "std": np.where(std > 1e-4, std, 1.0).astype(np.float32),
    }


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A selection rule; `pukd_ray.selection.rules` has one module for each."""

    name: str
    """As in `selection.rule`."""
    text: str
    """What it takes, for the report; may name the keys of `selection`, as in `{budget:,}`."""
    needs: tuple[str, ...] = ()
    """Keys of `selection` that must be set."""
    eligible: Callable[[SelectionConfig, Scores], np.ndarray] = everyone
    """bool [N]: rows that may be taken."""
    rank_by: Callable[[Scores], np.ndarray] = by_logit
    """float32 [N]: the highest are taken first; also what the average precision is measured by."""
    count: Callable[[SelectionConfig, Supply], int] | None = None
    """Rows to take, as far as there are so many; None: all that are eligible."""
    per_class: bool = False
    """The count is shared evenly over the teacher's classes."""
    follows_order: bool = False
    """`selection.order: random` has it draw instead of rank."""
    uses_selector: bool = True
    """False for rivals: a selector that fails then does not stop the run."""
    uses_scores: bool = True
    """False for rivals that need not have looked at an image: they cost no pass."""
    takes_highest: bool = True
    """Whether it takes the highest logits, of all or of each class: only then has the report a cut to show."""
    reads: tuple[str, ...] = ()
    """Columns of the score table that it reads beside the fields of `Scores`; they come in `Scores.more`."""
    scorer: Scorer | None = None
    """For a rule whose key is none of the columns that every run has: the pass writes it as column `name`."""
    if_empty: str = ""
    """What else to check where it takes nothing."""

    @property
    def known_by_logit(self) -> bool:
        """Whether P(relevant) of a logit holds for what it takes: not where another key, or truth, has a say."""
        return self.rank_by in (by_logit, by_tie_breaker) and (self.uses_selector or self.eligible is everyone)

    @property
    def positives_only(self) -> bool:
        """Whether it is confined to what the selector takes for relevant."""
        return self.eligible is positive_logit

    def draws(self, selection: SelectionConfig) -> bool:
        """Whether it draws at random from those that are eligible."""
        return self.follows_order and selection.order == "random"

    def ranking(self, selection: SelectionConfig, scores: Scores) -> np.ndarray:
        """float32 [N]: higher is taken first."""
        return by_tie_breaker(scores) if self.draws(selection) else self.rank_by(scores)

    def groups(self, scores: Scores) -> np.ndarray:
        """int64 [N]: rows compete within their group; one group but for rules that go by class."""
        labels = scores.teacher_label.astype(np.int64)
        return labels if self.per_class else np.zeros_like(labels)

    def targets(self, selection: SelectionConfig, available: np.ndarray, supply: Supply) -> np.ndarray | None:
        """Rows to take of each group, int64 [G], or None for all of the eligible ones, `available` [G]."""
        return None if self.count is None else share_quota(available, self.count(selection, supply))
