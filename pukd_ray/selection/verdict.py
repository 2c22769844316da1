"""One prior with its interval, which prior to train with, and how far to trust it: from the grid's held-out logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from pukd_ray.run.records import Estimator, Trust
from pukd_ray.selection.by_class import ClassBins
from pukd_ray.selection.calibration import Binned
from pukd_ray.selection.evidence import (
    LEVEL,
    Boundary,
    DensityRatio,
    TwoSample,
    class_weights,
    density_ratio,
    divergence,
    find_boundary,
    generous,
    net_of,
    two_sample,
)
from pukd_ray.selection.grid import FINE, Grid
from pukd_ray.selection.prior import bbe_prior
from pukd_ray.selection.training import Examples

# Set on 47 tuning tasks (Fashion pools and Gaussian mixtures; priors 0.002 to 0.6, P 10 to 100 per class, k 0 to 1.2).
BIASED = 0.53  # lower bound of the AUC above which P is called biased: teacher's own images against new ones have 0.51
TESTED = 0.56  # upper bound of the AUC up to which a bias is small: it moves the prior by less than 4 %
SPAN = 20.0  # upper by lower bound from which on the density ratio says too little
STRETCH = 1.75  # how much of KL(P || relevant) a linear classifier's AUC misses: k = 0.7 and 1.2 give 1.8 and 1.7
ENOUGH = 100  # labels of an audit
PRECISE = 2.0  # upper relative to lower limit of its prior, or to its value
GIVEN: tuple[Estimator, ...] = ("given", "audit")  # not by this package's own estimates
ALONG = 0.1  # share of a bias's KL that shows in the logits
FLATTER = 1.3  # what counts as a gap of the coarse grid, whose priors are far apart


@dataclass(frozen=True)
class Evidence:
    """All that was measured."""

    boundary: Boundary
    ratio: DensityRatio
    bbe: float
    """Best bin estimation on the logits that `ratio` was read from."""
    alike: float
    """Share of the relevant that lies where the classes overlap: sum_U min(q, 1 - q) / sum_U q."""
    test: TwoSample
    others: float
    """Share of what the test took of U that is not relevant, by the calibration."""
    shares: tuple[tuple[float, float], ...]
    """(prior, share of U that its network takes) along the grid."""

    @property
    def biased(self) -> bool:
        """Whether P surely differs from what is relevant of U."""
        return net_of(self.test.lower, self.others) > BIASED

    def by_ratio(self) -> tuple[float, float, float]:
        """(prior, lower, upper bound) by P's density ratio; the upper bound may be above 1.

        What looks like both may be either, and a bias that the test could not see puts the density ratio too low.
        """
        value = max(self.ratio.value * (1 - self.alike / 4), 1e-4)
        lower, upper = (float(q) for q in np.quantile(self.ratio.draws, [0.05, 0.95]))
        unseen = float(np.exp(STRETCH * divergence(self.test.upper)))
        return value, min(lower, value) * (1 - self.alike / 2), max(upper, value) * unseen / max(1 - self.alike, 1e-3)


@dataclass(frozen=True)
class Verdict:
    """What is concluded."""

    prior: float
    lower: float
    """90 %; 0 and 1 where nothing can be told."""
    upper: float
    train: float
    """The prior to train with: one that is too small is the dangerous side."""
    trust: Trust
    reasons: tuple[str, ...]
    evidence: Evidence | None
    """Of a prior that is given what it makes of U, once a selector was trained with it; before, None."""
    estimator: Estimator

    @property
    def has_gap(self) -> bool:
        """Whether the boundary of a selector trained so runs through a gap in U; taken for granted of a given prior."""
        return self.estimator in GIVEN or (self.evidence is not None and self.evidence.boundary.inner)

    def bias_of_logits(self) -> float:
        """KL divergence of P's logits from those of U's relevant images, as far as the test shows a bias."""
        e = self.evidence
        return 0.0 if e is None else ALONG * STRETCH * divergence(net_of(e.test.auc, e.others))

    def drawn_bias_of_logits(self, rng: np.random.Generator) -> float:
        """The same with what the test does not rule out; how much of a bias shows in the logits is not known."""
        e = self.evidence
        if e is None:
            return 0.0
        auc = net_of(float(rng.normal(e.test.auc, e.test.error)), e.others)
        return float(2 * ALONG * rng.random() * STRETCH * divergence(auc))

    def drawn_prior(self, rng: np.random.Generator) -> float:
        """A prior whose logarithm is normal to either side of `prior`, with 90 % between the bounds."""
        z = float(rng.normal()) / LEVEL
        end = max(self.upper if z > 0 else self.lower, 1e-4)
        return float(np.clip(self.prior * (end / self.prior) ** abs(z), 1e-4, 1 - 1e-4))


def finer_priors(coarse: Grid) -> tuple[float, ...]:
    """Priors between the neighbours of the emptiest boundary; without one around what the density ratio says."""
    found = find_boundary(coarse.priors, coarse.p, coarse.u, flat=FLATTER)
    if found.inner:
        low, high = found.priors[[max(0, found.best - 1), min(len(found.priors) - 1, found.best + 1)]]
    else:
        g = generous(coarse.priors, coarse.p, coarse.u)
        centre = bbe_prior(coarse.p[g], coarse.u[g]).value
        low, high = max(1e-3, centre / 1.5), min(0.9, max(3 * centre, 2e-3))
    return tuple(np.geomspace(low, high, FINE + 2)[1:-1].tolist())


def weigh(
    grids: Sequence[Grid],
    features: Examples,
    p_classes: np.ndarray,
    u_classes: np.ndarray,
    units: np.ndarray,
    seed: int,
) -> Evidence:
    """Collect the evidence of held-out logits; classes are the teacher's labels of P [n_p] and U [n_u]."""
    grid = reduce(Grid.joined, grids)
    boundary = find_boundary(grid.priors, grid.p, grid.u)
    g = generous(grid.priors, grid.p, grid.u)
    at = max(boundary.best, min(g, boundary.best + 1)) if boundary.inner else g
    p_logits, u_logits = grid.p[at], grid.u[at]
    bins = ClassBins.of(p_logits, u_logits, p_classes, u_classes)
    fitted = bins.fit()
    ratio, probability = density_ratio(bins, fitted, units, seed=seed), fitted.probability
    # A class of which P looks like all of U would seem clear by itself.
    together = Binned.of(p_logits, u_logits).fit()[0](u_logits)
    alike = max(float(np.minimum(q, 1 - q).sum() / q.sum()) for q in (together, probability))
    if boundary.inner:
        # What lies beyond the gap, less the quarter next to it: few others are there, for any prior.
        shown, others = boundary.best, 0.0
        beyond = grid.u[shown]
        cut = float(np.quantile(beyond[beyond > 0], 0.25))
    else:
        shown = at
        cut = float(np.quantile(u_logits, 1 - min(1.0, max(0.6 * ratio.value, 20 / len(u_logits)))))
        others = float(1 - probability[u_logits > cut].mean()) if (u_logits > cut).any() else 0.0
    mine, theirs = grid.p[shown] > cut, grid.u[shown] > cut
    weights = class_weights(p_classes[mine], u_classes[theirs])
    test = two_sample(features.p[mine, 0], features.u[theirs], weights, seed)
    shares = tuple(zip(grid.priors.tolist(), (grid.u > 0).mean(1).tolist(), strict=True))
    return Evidence(boundary, ratio, bbe_prior(p_logits, u_logits).value, alike, test, others, shares)


def judge(e: Evidence) -> Verdict:
    """Conclude; of what is not known the interval gets wider, and where too little is known there is no figure.

    Where U has a gap and P looks like what lies beyond, the density ratio is the finer estimate; where P does not, the
    gap alone speaks. Without a gap only the density ratio is left, which a biased P puts too low: it then has to pass
    the two-sample test.
    """
    found, gap, biased = e.boundary, e.boundary.inner, e.biased
    value, lower, upper = e.by_ratio()
    vague = upper > SPAN * lower
    upper = min(1.0, upper)
    apart = gap and (upper < found.lower_bound or lower > found.upper_bound)
    reasons: list[str] = []
    auc = f"AUC {e.test.auc:.2f} +- {LEVEL * e.test.error:.2f}"
    if biased:
        reasons.append(f"P differs from what is taken of U ({auc})")
    if apart:
        reasons.append(f"the density ratio says {e.ratio.value:.3g}, the emptiest boundary {found.value:.3g}")
    if not gap:
        reasons.append("no gap in U between what is relevant and the rest")
    if vague:
        reasons.append(f"by its density ratio the prior may be anything from {lower:.2g} to {upper:.2g}")
    untested = not biased and e.test.upper > TESTED
    settled = not reasons
    if untested:
        reasons.append(f"too few images to see whether P is biased ({auc})")
    told = tuple(reasons)
    if gap and not settled:
        return Verdict(found.value, found.lower_bound, found.upper_bound, found.value, "low", told, e, "boundary")
    if gap:
        train = max(found.value, value)
        ends = (found.lower_bound, found.upper_bound) if untested else (found.value, found.value)
        lower, upper = min(lower, ends[0]), max(upper, ends[1])
        if untested:
            return Verdict(float(np.sqrt(value * found.value)), lower, upper, train, "low", told, e, "both")
        return Verdict(value, lower, upper, train, "high", told, e, "density_ratio")
    # A prior twice too large ranks better than one that is too small, and worse than the right one.
    bbe = float(np.clip(e.bbe, 1e-4, 1 - 1e-4))  # exactly 0 where nothing of U looks like P
    if biased or vague:  # how many to take has to be decided all the same; the density ratio may have collapsed
        return Verdict(bbe, 0.0, 1.0, float(np.clip(2 * bbe, value, 0.7)), "none", told, e, "bbe")
    return Verdict(value, lower, upper, float(np.clip(bbe, value, 0.7)), "low", told, e, "density_ratio")


def given(prior: float) -> Verdict:
    """Of a prior that is known, as long as nobody has looked whether P goes with it: see `examine`."""
    return Verdict(prior, prior, prior, prior, "low", (), None, "given")


@dataclass(frozen=True)
class LabelledPrior:
    """The prior by labels of a random sample, of an audit."""

    value: float
    lower: float
    """90 %."""
    upper: float
    labelled: int
    """Images that it rests on."""
    reasons: tuple[str, ...] = ()
    """Why it may not be the corpus's."""


def audited(prior: LabelledPrior) -> Verdict:
    """The same of a prior by labels."""
    reasons = list(prior.reasons)
    value, lower, upper = (float(np.clip(v, 1e-4, 1 - 1e-4)) for v in (prior.value, prior.lower, prior.upper))
    if prior.labelled < ENOUGH or upper > PRECISE * max(lower, value / PRECISE):
        reasons.append(f"{prior.labelled} labels leave the prior between {lower:.3g} and {upper:.3g}: label more")
    return Verdict(value, lower, upper, value, "low", tuple(reasons), None, "audit")


def examine(verdict: Verdict, e: Evidence, *, needs_p: bool = True) -> Verdict:
    """The same prior, and what to think of it and of P after a selector was trained with it; `e` is of that one prior.

    Precision and recall are estimated from P, whoever says the prior: a biased P spoils them, unless labelled images
    stand for it (`needs_p` is false).
    """
    _, lower, upper = e.by_ratio()
    auc = f"AUC {e.test.auc:.2f} +- {LEVEL * e.test.error:.2f}"
    reasons = list(verdict.reasons)
    if needs_p and e.biased:
        reasons.append(f"P differs from what is taken of U ({auc})")
    elif needs_p and e.test.upper > TESTED:
        reasons.append(f"too few images to see whether P is biased ({auc})")
    if verdict.upper < lower or verdict.lower > upper:
        reasons.append(f"the density ratio says {e.ratio.value:.3g}, the prior that is given {verdict.prior:.3g}")
    return replace(verdict, trust="low" if reasons else "high", reasons=tuple(reasons), evidence=e)
