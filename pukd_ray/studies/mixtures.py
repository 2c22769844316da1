"""Simulated teacher features of known overlap: what Fashion-MNIST's ten classes cannot give, such as a hundred classes.

Kinds are normal with unit variance. The centres of the classes lie on a sphere, those of the others on a smaller one:
what a network does not know often has smaller features. The radius says how much they overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RADII = {5: {"easy": 7.0, "hard": 5.0}, 10: {"easy": 8.0, "hard": 5.5}, 100: {"easy": 20.0, "hard": 14.0}}
"""By the number of classes. With a prior of 0.25 and 100 of P per class nnPU ranks U with an average precision of 0.99
and more where it is easy, 0.95 to 0.98 where it is hard."""
OTHERS = 0.4
"""Radius of the others' sphere relative to that of the classes."""
STYLES = 4
"""Directions that vary from image to image and say nothing of its class."""
CHANNELS = 64
VIEWS = 4
VIEW_NOISE = 0.15


@dataclass(frozen=True)
class Sample:
    """What the recipe is given, and the truth."""

    p: np.ndarray
    """float16 [n_p, VIEWS, CHANNELS], the image itself first."""
    u: np.ndarray
    """float16 [n_u, CHANNELS]."""
    p_classes: np.ndarray
    """The teacher's labels: the nearest class, int64 [n_p]."""
    u_classes: np.ndarray
    relevant: np.ndarray
    """Truth of U, bool [n_u]."""
    last_tap: int = 0
    """So many of the channels, the last ones, are the last tap's; 0: all."""


def class_shares(classes: int, mix: str) -> np.ndarray:
    """Of the relevant images, [classes]: `balanced`, or by Zipf's law 1, 1/2, 1/3, ..."""
    weights = 1 / np.arange(1, classes + 1) if mix == "Zipf" else np.ones(classes)
    return np.asarray(weights / weights.sum())


def draw_mixture(
    rng: np.random.Generator,
    *,
    rows: int,
    prior: float,
    classes: int,
    per_class: int,
    overlap: str,
    mix: str,
    bias: float,
) -> Sample:
    """Draw P, `per_class` of each class, and `rows` of U of which a share `prior` is relevant.

    With a `bias` k, P has density proportional to exp(k z) times that of U's relevant images; z is standard normal in
    each class, four fifths of it style and one fifth of what tells classes apart. That moves its mean by k.
    """
    told, kinds = (48 if classes > 10 else 16), classes + max(10, classes)
    centres = rng.normal(size=(kinds, told))
    centres *= RADII[classes][overlap] / np.linalg.norm(centres, axis=1, keepdims=True)
    centres[classes:] *= OTHERS
    mixed = rng.normal(size=(told + STYLES, CHANNELS)) * 1.5 / (told + STYLES) ** 0.5
    moved = np.zeros(told + STYLES)
    moved[[told, 0]] = bias * np.array([2, 1]) / 5**0.5

    def latents(of: np.ndarray) -> np.ndarray:
        x = rng.normal(size=(len(of), told + STYLES))
        x[:, :told] += centres[of]
        return x

    def features(x: np.ndarray) -> np.ndarray:
        """Through a random layer of leaky rectifiers, with noise."""
        h = x @ mixed
        return np.asarray(np.maximum(h, 0.3 * h) + 0.1 * rng.normal(size=h.shape)).astype(np.float16)

    def labels(x: np.ndarray) -> np.ndarray:
        c = centres[:classes]
        return np.asarray((x[:, :told] @ c.T - (c**2).sum(1) / 2).argmax(1))

    n_relevant = round(prior * rows)
    relevant = rng.choice(classes, n_relevant, p=class_shares(classes, mix))
    drawn = rng.permutation(np.r_[relevant, rng.integers(classes, kinds, rows - n_relevant)])
    u = latents(drawn)
    p = latents(np.repeat(np.arange(classes), per_class)) + moved
    seen = [p] + [p + VIEW_NOISE * rng.normal(size=p.shape) for _ in range(VIEWS - 1)]
    return Sample(np.stack([features(x) for x in seen], 1), features(u), labels(p), labels(u), drawn < classes)
