"""A rival: relative Mahalanobis distance of the teacher's last tap (Ren et al. 2021), P against U.

-(min_k M_k - M_0): M_k the squared Mahalanobis distance to the mean of class k of P under the covariance within the
classes, M_0 that to the mean of U under its covariance; U stands in for the paper's background, all training data.
Both covariances are shrunk (Ledoit and Wolf 2004), in dimensions standardised by U.
"""

from collections.abc import Mapping

import numpy as np

from pukd_ray.selection.rules.base import Rule, Scorer, by_column, moments, the_budget

LEAST_VARIANCE = 1e-6  # of U's in a dimension: below is what float16 rounds


def _standardised(features: np.ndarray, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [n, C]: differences of large distances are what counts."""
    z: np.ndarray = (features.astype(np.float64) - fitted["mean"]) / fitted["std"]
    return z


def _whitening(covariance: np.ndarray) -> np.ndarray:
    """W [C, C] with |x W|^2 = x covariance^-1 x^T."""
    variances, axes = np.linalg.eigh(covariance)
    whitening: np.ndarray = axes / np.sqrt(np.maximum(variances, LEAST_VARIANCE))
    return whitening


def _contrasts(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each image of z [n, C] against the mean of those of its class before it, [n - classes, C].

    Scaled (Helmert) they are uncorrelated, with mean 0 and the covariance within the classes, as no residuals are: of
    two images in a class the residuals are one and the same but for the sign, and Ledoit-Wolf would trust them. A
    class of one image has none.
    """
    rows = []
    for k in np.unique(labels):
        x = z[labels == k]
        before = np.arange(1, len(x))[:, None]
        rows.append(np.sqrt(before / (before + 1)) * (x[1:] - np.cumsum(x, 0)[:-1] / before))
    return np.concatenate(rows)


def _fit(p: np.ndarray, u: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.covariance import ledoit_wolf

    by_u = moments(u)
    z_p, z_u = _standardised(p, by_u), _standardised(u, by_u)
    whiten_u = _whitening(ledoit_wolf(z_u)[0])
    within = _contrasts(z_p, labels)
    # One contrast has no spread to shrink by, and without any nothing is known within classes: then U's covariance.
    whiten_p = _whitening(ledoit_wolf(within, assume_centered=True)[0]) if len(within) > 1 else whiten_u
    means = np.stack([z_p[labels == k].mean(0) for k in np.unique(labels)])
    return {
        **by_u,
        "whiten_u": whiten_u,
        "whiten_p": whiten_p,
        "white_mean_of_u": z_u.mean(0) @ whiten_u,
        "white_means_of_p": means @ whiten_p,
    }


def _score(fitted: Mapping[str, np.ndarray], features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    del teacher_logits
    z = _standardised(features, fitted)
    to_u = ((z @ fitted["whiten_u"] - fitted["white_mean_of_u"]) ** 2).sum(1)
    white, means = z @ fitted["whiten_p"], fitted["white_means_of_p"]
    to_classes = (white**2).sum(1, keepdims=True) - 2 * white @ means.T + (means**2).sum(1)
    closeness: np.ndarray = to_u - to_classes.min(1)
    return closeness.astype(np.float32)


RULE = Rule(
    name="rmds",
    text="the {budget:,} images nearest to a class of the positives by relative Mahalanobis distance in the teacher's "
    "last features, without the selector",
    needs=("budget",),
    rank_by=by_column("rmds"),
    reads=("rmds",),
    scorer=Scorer(_fit, _score),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
