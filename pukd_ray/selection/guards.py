"""What stops a run at the selector, and what it warns of: going on would waste the cluster's time."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pukd_ray.config import RunConfig
from pukd_ray.errors import RunError
from pukd_ray.runtime.console import say
from pukd_ray.selection.crossfit import FitReport
from pukd_ray.selection.features import LABELS, Features
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.verdict import GIVEN, Verdict

MIN_POSITIVES = 10
MIN_SAMPLE = 100
MIN_PRIOR = 0.005  # below, held-out scores of U show next to nothing that looks like P
# Below, the head selects next to nothing: the clamp won (docs/method.md, "A wrong prior is not symmetric").
MIN_SHARE_OF_PRIOR = 0.2
MAX_SHARE = 0.95
ABOVE = 0.75  # share of P in the upper half of the corpus's relevant images; were they alike, it would be a half


def check_sample(config: RunConfig, n_p: int, n_u: int, errors: list[tuple[str, str, str]]) -> None:
    """Say which positives are not used, of the (role, image, error) of what could not be read.

    RunError if of P or of the sample of U too few images are readable.
    """
    bad_p = [(image, error) for role, image, error in errors if role == "positives"]
    for image, error in bad_p[:10]:
        say(f"          positives: {image} is not used: {error}")
    if len(bad_p) > 10:
        say(f"          positives: {len(bad_p) - 10} more are not used; see selector/meta.json")
    if n_p < MIN_POSITIVES:
        raise RunError(
            f"positives: {n_p} readable images ({len(bad_p)} unreadable), at least {MIN_POSITIVES} are needed: "
            "add images to P"
        )
    reasons = Counter(error.partition(":")[0] for role, _, error in errors if role == "corpus")
    rejected = sum(reasons.values())
    if n_u + rejected >= MIN_SAMPLE and rejected > config.score.max_rejected * (n_u + rejected):
        what = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(3))
        raise RunError(
            f"corpus: {rejected} of {n_u + rejected} sampled images are unreadable ({what}), more than "
            f"score.max_rejected = {config.score.max_rejected:g}: check corpus.uri, corpus.image_column and the files, "
            "or raise it"
        )
    if n_u < MIN_POSITIVES:
        raise RunError(f"corpus: only {n_u} readable images: check corpus.uri")


def check_teacher_agrees(light: Features, config: RunConfig) -> float:
    """Share of P whose labels are those that the teacher gives.

    RunError where shifted labels or wrong preprocessing show; warns of classes without P and of a low share.
    """
    classes = config.teacher.num_classes
    own = light.p_units != LABELS  # the class of images that joined is the teacher's word
    labels, teacher = light.p_labels[own], light.p_teacher[own]
    agreement = float((labels == teacher).mean())
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        say(
            f"          warning: positives has no image of {len(missing)} of {classes} classes ({shown}): "
            "images of these will hardly be selected"
        )
    shifts = (
        [float(((labels + s) % classes == teacher).mean()) for s in range(classes)] if classes <= 1000 else [agreement]
    )
    best = int(np.argmax(shifts))
    if best and shifts[best] > agreement + 0.2:
        raise RunError(
            f"positives: the teacher agrees with only {agreement:.0%} of the labels, but with {shifts[best]:.0%} of "
            f"them shifted by {best if best <= classes // 2 else best - classes:+d}: they are not teacher "
            "indices; use positives.label_map, or names with teacher.classes"
        )
    if agreement < min(0.5, 2 / classes):
        raise RunError(
            f"positives: the teacher agrees with only {agreement:.0%} of the labels (chance: {1 / classes:.0%}): "
            "check the labels, teacher.weights, and teacher.mean, std, channels and resize"
        )
    if agreement < 0.7:
        say(f"          warning: the teacher agrees with only {agreement:.0%} of P's labels")
    return agreement


def check_prior(config: RunConfig, verdict: Verdict) -> None:
    """RunError if the sample holds next to nothing that looks like P, and the rule goes by the selector."""
    if not RULES[config.selection.rule].uses_selector or config.selector.prior != "auto":
        return
    if verdict.prior < MIN_PRIOR and verdict.trust == "none":
        raise RunError(
            f"corpus: next to nothing in the sample looks like P (estimated prior {verdict.prior:.4f}): check that "
            "corpus and positives show the same things, or set selector.prior if you know that relevant images are "
            "there"
        )


def fit_warnings(fit: FitReport, verdict: Verdict) -> list[str]:
    """What speaks against the selector and its estimates."""
    warnings = []
    if verdict.trust == "none":
        warnings.append(
            f"prior, precision and recall cannot be told ({'; '.join(verdict.reasons)}): `pukd audit` finds them with "
            "a few hundred labels, or set selector.prior if you know it"
        )
    elif verdict.reasons:
        warnings.append(f"the estimates are of low trust: {'; '.join(verdict.reasons)}; `pukd audit` checks them")
    if fit.recall < 0.5:
        warnings.append(
            f"only {fit.recall:.0%} of held-out positives are recognised: P may be too small or too varied; add images"
        )
    if fit.calibration.at_bound and _is_above(fit, verdict.prior):
        warnings.append(
            f"P scores higher than what a prior of {verdict.prior:.3g} takes of the corpus: it is too high, or P "
            "differs from the corpus in something beside what it shows; probabilities are too extreme: `pukd audit` "
            "checks both"
            if verdict.estimator in GIVEN
            else "P scores higher than anything in the corpus: probabilities are too extreme; label some corpus images "
            "and set selector.prior"
        )
    return warnings


def _is_above(fit: FitReport, prior: float) -> bool:
    """Whether held-out P scores higher than U's relevant images do, half of which are above U's 1 - prior / 2 quantile.

    A slope at its bound alone does not say so: it also is where U parts cleanly.
    """
    w = fit.p_weights / fit.p_weights.sum()
    share = float(w @ (fit.p_logits > np.quantile(fit.u_logits, 1 - prior / 2)))
    return share > max(ABOVE, 0.5 + 3 * 0.5 * float(np.sqrt(w @ w)))


def check_selection(config: RunConfig, share: float, prior: float) -> None:
    """RunError if the rule goes by a selector that, as trained, takes next to nothing of the sample, or all of it."""
    if not RULES[config.selection.rule].uses_selector:
        return
    if share < MIN_SHARE_OF_PRIOR * prior:
        raise RunError(
            f"corpus: the selector takes {share:.2%} of the sample where the prior is {prior:.2%}: nothing to train a "
            "student on; set selector.prior higher, or add images to P"
        )
    if share > MAX_SHARE:
        raise RunError(
            f"corpus: the selector takes {share:.0%} of the sample: it tells nothing apart; set selector.prior lower, "
            "or distil from the whole corpus by selection.rule random"
        )
