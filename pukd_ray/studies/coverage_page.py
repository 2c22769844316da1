"""The page of the coverage study, made of its JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pukd_ray.studies.coverage import FACTORS, ROWS, SETTINGS
from pukd_ray.studies.pages import HERE, render_page

Figures = Mapping[str, float]
TRUE = {"prior": "true_prior", "precision": "precision", "recall": "recall"}
"""Where each figure's truth is."""
WIDE_ENOUGH = 1e-4
"""The truth is told to five digits."""


def render(study: Mapping[str, Any], file: str = "coverage.json", command: str = "pukd coverage-study") -> str:
    """Markdown; `file` is where in docs/results the study is."""
    runs: Mapping[str, Figures] = study["runs"]
    cases = [(key.split("/")[:-1], f) for key, f in runs.items() if not key.startswith("test/")]
    rows = [_row("all", [f for _, f in cases])]
    for i, (factor, values) in enumerate(FACTORS.items()):
        rows += [
            _row(f"{factor}: {value}", [f for case, f in cases if case[i] == str(value)])
            for value in dict.fromkeys(values)
        ]
    names = list(FACTORS)
    plain = [
        f
        for values, f in cases
        if float(values[names.index("bias")]) == 0
        and int(values[names.index("per class")]) >= 50
        and float(values[names.index("prior")]) >= 0.01
    ]
    return render_page(
        "coverage.md.j2",
        command=command,
        file=file,
        tuning=study["tuning"],
        machine=study["machine"],
        seconds=f"{np.median([f['seconds'] for f in runs.values()]):.0f}" if runs else "no",
        remarks=(HERE / "coverage_remarks.md").read_text(encoding="utf-8"),
        count=len(cases),
        settings=", ".join(f"{name} {value}" for name, value in SETTINGS.items()),
        factors={name: ", ".join(map(str, dict.fromkeys(values))) for name, values in FACTORS.items()},
        rows_of_u=ROWS,
        rows=rows,
        given=sum(f["trust"] > 0 for f in plain),
        plain=len(plain),
        tests=_tests(runs),
    )


def holds(figures: Figures, name: str) -> bool:
    """Whether the interval of a figure holds its truth."""
    low, high, truth = figures[f"{name}_lower"], figures[f"{name}_upper"], figures[TRUE[name]]
    return low - WIDE_ENOUGH <= truth <= high + WIDE_ENOUGH


def _row(name: str, runs: Sequence[Figures]) -> list[str]:
    given = [f for f in runs if f["trust"] > 0]
    held = [f"{sum(holds(f, figure) for f in given)}" for figure in TRUE]
    biased = f"{sum(f['biased'] for f in runs):.0f}"
    if not given:
        return [name, str(len(runs)), "0", *held, "-", "-", "-", biased]
    width = f"{np.median([f['prior_upper'] / max(f['prior_lower'], 1e-4) for f in given]):.2f}"
    others = [f"{np.median([f[f'{n}_upper'] - f[f'{n}_lower'] for f in given]):.2f}" for n in ("precision", "recall")]
    return [name, str(len(runs)), str(len(given)), *held, width, *others, biased]


def _tests(runs: Mapping[str, Figures]) -> list[list[str]]:
    rows = []
    tests = {key: f for key, f in runs.items() if key.startswith("test/")}
    for bias in sorted({key.split("/")[1] for key in tests}):
        of = [f for key, f in tests.items() if key.split("/")[1] == bias]
        given = [f for f in of if f["trust"] > 0]
        auc = [f["auc"] for f in of]
        held = f"{sum(holds(f, 'prior') for f in given)} of {len(given)}"
        called = f"{sum(f['biased'] for f in of):.0f}"
        rows.append([bias, str(len(of)), called, f"{np.mean(auc):.3f} ± {np.std(auc):.3f}", held])
    return rows
