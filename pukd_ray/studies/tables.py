"""docs/results.md out of a study's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pukd_ray.demo.pools import MEASURED
from pukd_ray.studies.cifar import POOL as CIFAR
from pukd_ray.studies.pages import render_page
from pukd_ray.studies.selector import BIASED, RIVALS, TRUST

Figures = dict[str, float]
TOLD = ", prior: true"
"""Of a setting whose selector is told the prior."""


def render(study: dict[str, Any], command: str) -> str:
    """The page, Markdown; a setting that was not run has no row."""
    runs: dict[str, Figures] = study["runs"]

    def chosen(base: str, pool: str, setting: str) -> dict[int, Figures]:
        """Figures by seed."""
        prefix = f"{base}/{pool}/{setting}/"
        return {int(key[len(prefix) :]): value for key, value in runs.items() if key.startswith(prefix)}

    pools = [name for name in (*MEASURED, CIFAR) if name in study["pools"]]
    defaults = {name: list(chosen("default", name, "default").values()) for name in pools}
    seeds = sorted(chosen("default", "hard", "default"))
    ablations = {
        pool: _ablation({s: _first(chosen("quick", pool, s), seeds) for s in _settings(runs, pool)})
        for pool in ("hard", "rare", CIFAR)
        if len(_settings(runs, pool)) > 1
    }
    return render_page(
        "results.md.j2",
        command=command,
        machine=study["machine"],
        pools={name: study["pools"][name] for name in pools},
        headline=list(zip(*(_headline(defaults[name]) for name in pools), strict=True)),
        rivals=list(zip(*(_rivals(defaults[name]) for name in pools), strict=True)),
        biased=_biased({s: chosen("default", "hard", s) for s in ("default", *BIASED)}),
        ablations=ablations,
        cost=_cost(chosen("quick", "hard", "default"), chosen("quick", "hard", "trunk: finetune")),
        coverage={pool: _coverage(defaults[pool]) for pool in pools if _told(defaults[pool])},
    )


def _rivals(runs: list[Figures]) -> list[tuple[str, str]]:
    """(who, average precision) of the selector, the rival rules and the model that is told the truth."""
    rows = [("**the selector**", "ap"), *((f"`{name}`", f"ap_{name}") for name in RIVALS)]
    rows.append(("a linear model that is told the truth", "ap_supervised"))
    return [(who, _shown([f[key] for f in runs])) for who, key in rows]


def _biased(settings: dict[str, dict[int, Figures]]) -> list[dict[str, str]]:
    """One row per bias, with what a selector made of it that was told the prior."""
    rows = []
    for name, runs in settings.items():
        if not runs or name.endswith(TOLD):
            continue
        told = settings.get(name + TOLD, {})
        row = {
            key: _shown([f[key] for f in runs.values()])
            + (f" ({_shown([f[key] for f in told.values()])})" if told else "")
            for key in ("ap", "precision", "recall", "f1")
        }
        prior = _shown([f["prior"] for f in runs.values()])
        rows.append({"name": name, "prior": prior, "held": _held(list(runs.values())), **row})
    return rows


def _settings(runs: dict[str, Figures], pool: str) -> list[str]:
    keys = [key.split("/") for key in runs]
    return list(dict.fromkeys(setting for base, of, setting, _ in keys if (base, of) == ("quick", pool)))


def _first(figures: dict[int, Figures], seeds: Sequence[int]) -> dict[int, Figures]:
    return {seed: figures[seed] for seed in seeds if seed in figures}


def _shown(values: Sequence[float], digits: int = 3) -> str:
    if not len(values):
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _headline(runs: list[Figures]) -> list[tuple[str, str]]:
    """(what, mean ± standard deviation over seeds) of the default settings."""
    runs = [{**f, "prior_error": abs(f["prior"] - f["true_prior"])} for f in runs]
    rows = [
        ("average precision", "ap", 4),
        ("precision at the default threshold", "precision", 3),
        ("recall at the default threshold", "recall", 3),
        ("F1 at the default threshold", "f1", 3),
        ("F1 at the best threshold", "best_f1", 3),
        ("recall at precision 0.8", "recall_at_target", 3),
        ("`precision: 0.8`: true precision", "target_precision", 3),
        ("`precision: 0.8`: true recall", "target_recall", 3),
        ("prior, estimated", "prior", 4),
        ("prior, absolute error", "prior_error", 4),
        ("precision, estimated", "precision_estimated", 3),
        ("recall, estimated", "recall_estimated", 3),
        ("expected calibration error", "calibration_error", 4),
        ("CPU seconds: features", "feature_seconds", 1),
        ("CPU seconds: cross-fit and final selector", "fit_seconds", 0),
    ]
    shown = [(name, _shown([f[key] for f in runs if key in f], digits)) for name, key, digits in rows]
    return [("seeds", str(len(runs))), *shown, ("prior intervals that hold the truth", _held(runs))]


def _told(runs: Sequence[Figures]) -> list[Figures]:
    """Those whose figures a user gets to see: not where the answer is "cannot tell"."""
    return [f for f in runs if f["trust"] > TRUST["none"]]


def _held(runs: Sequence[Figures]) -> str:
    told = _told(runs)
    held = sum(f["prior_lower"] <= f["true_prior"] <= f["prior_upper"] for f in told)
    silent = len(runs) - len(told)
    return f"{held} of {len(told)}" + (f" ({silent} cannot tell)" if silent else "")


def _ablation(settings: dict[str, dict[int, Figures]]) -> list[dict[str, str]]:
    """One row per setting; differences are paired by seed."""
    default = settings.get("default", {})
    rows = []
    for name in sorted(settings, key=lambda s: (s != "default", s)):
        runs = settings[name]
        difference = [figures["ap"] - default[seed]["ap"] for seed, figures in runs.items() if seed in default]
        row = {key: _shown([f[key] for f in runs.values()]) for key in ("ap", "precision", "recall", "f1", "best_f1")}
        prior = _shown([f["prior"] for f in runs.values()], 4)
        cpu = _shown([f["fit_seconds"] + f["feature_seconds"] for f in runs.values() if "fit_seconds" in f], 0)
        rows.append({"name": name, "difference": _shown(difference, 4), "prior": prior, "cpu": cpu, **row})
    return rows


def _cost(frozen: dict[int, Figures], finetune: dict[int, Figures]) -> dict[str, float] | None:
    """Finetune against frozen, on the seeds that have both."""
    both = sorted(
        s for s in frozen.keys() & finetune.keys() if "fit_seconds" in frozen[s] and "fit_seconds" in finetune[s]
    )
    if not both:
        return None

    def mean(runs: dict[int, Figures], *names: str) -> float:
        return float(np.mean([sum(runs[s][name] for name in names) for s in both]))

    seconds = [mean(runs, "feature_seconds", "fit_seconds") for runs in (frozen, finetune)]
    return {"ratio": seconds[1] / seconds[0], "ap": mean(finetune, "ap") - mean(frozen, "ap"), "seeds": len(both)}


def _coverage(runs: list[Figures]) -> list[tuple[str, int, int, str, str]]:
    """(figure, intervals that hold the truth, of how many that are told, mean truth - estimate, mean width)."""
    runs = _told(runs)
    rows = []
    for name, true, estimate in (
        ("prior", "true_prior", "prior"),
        ("precision", "precision", "precision_estimated"),
        ("recall", "recall", "recall_estimated"),
    ):
        held = sum(f[f"{name}_lower"] <= f[true] <= f[f"{name}_upper"] for f in runs)
        gap = np.mean([f[estimate] - f[true] for f in runs]) if runs else 0.0
        width = np.mean([f[f"{name}_upper"] - f[f"{name}_lower"] for f in runs]) if runs else 0.0
        rows.append((name, held, len(runs), f"{gap:+.4f}", f"{width:.4f}"))
    return rows
