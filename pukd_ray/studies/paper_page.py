"""The table's figures as Markdown and a plot."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from pukd_ray.studies.pages import render_page
from pukd_ray.studies.rows import BUILT_IN, spends

COMPARED = (
    ("pu_s1", "p_only"),
    ("pu_s1", "random"),
    ("pu_s1", "all"),
    ("pu_s1", "truth"),
    ("pu_s1", "kd"),
    *(
        ("recommended", rival)
        for rival in (
            "all",
            "random",
            "knn",
            "linear_probe",
            "teacher_confidence",
            "teacher_topk_per_class",
            "p_only",
            "p_long",
            "truth",
            "kd_few",
            "kd",
        )
    ),
)
LEVEL = 0.95
STAGES = ("selector", "score")
"""Of a run, before its selection and student."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean; not a number for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _by_row(table: dict[str, Any], equal: str) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """{(row, per class): {seed: student}} in the order in which they were made."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for student in table["students"].values():
        is_in_both = student["row"] == "kd" and student["equal"] == "steps"
        if student["equal"] == equal or (equal == "epochs" and is_in_both):
            found.setdefault((student["row"], student["positives_per_class"]), {})[student["seed"]] = student
    return found


def _difference(ones: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Mean paired difference of top-1 in points, with its interval."""
    both = sorted(ones.keys() & others.keys())
    values = [100 * (ones[s]["top1"] - others[s]["top1"]) for s in both]
    if not values:
        return ""
    lower, upper = interval(values)
    return f"{np.mean(values):+.2f}" + ("" if np.isnan(lower) else f" [{lower:+.2f}, {upper:+.2f}]")


def _title(students: dict[int, dict[str, Any]]) -> str:
    return str(next(iter(students.values()))["title"])


def _mean(students: dict[int, dict[str, Any]], key: str, form: str) -> str:
    values = [s[key] for s in students.values() if s[key] is not None]
    return format(np.mean(values), form) if values else ""


def _device(student: dict[str, Any]) -> str:
    return str(student.get("device", "CPU"))  # tables of earlier versions do not say


def timed_device(table: dict[str, Any]) -> str | None:
    """The device whose students' seconds are shown, that of most of them; None if no student's are known.

    Seconds of a CPU and of a GPU have no mean that any student takes.
    """
    devices = Counter(_device(s) for s in table["students"].values() if s["seconds"] is not None)
    return max(devices, key=lambda name: devices[name], default=None)


def _seconds(table: dict[str, Any], students: dict[int, dict[str, Any]]) -> float | None:
    """Mean of those on the timed device; None if there are none."""
    device = timed_device(table)
    values = [s["seconds"] for s in students.values() if s["seconds"] is not None and _device(s) == device]
    return float(np.mean(values)) if values else None


def _whole(value: float | None) -> str:
    return "" if value is None else format(value, ",.0f")


def _accuracy(students: dict[int, dict[str, Any]]) -> str:
    values = [100 * s["top1"] for s in students.values()]
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def _reference(table: dict[str, Any]) -> tuple[str, int]:
    """(row, per class) that the others are compared with."""
    found = _by_row(table, "steps")
    return next(("kd" if ("kd", n) in found else "all", n) for _, n in found)


def table_rows(table: dict[str, Any], equal: str) -> list[dict[str, str]]:
    """The cells of one table, a dict per row: those at equal `steps` or `epochs`."""
    found, reference = _by_row(table, equal), _reference(table)
    rows = []
    for (name, per_class), students in found.items():
        if name not in BUILT_IN:
            continue
        runs = [table["runs"][f"{per_class}-seed{seed}"] for seed in students]
        ranked = name in ("pu_s1", "pu_s2_top", "recommended")
        ap = [run["average_precision"] for run in runs if run["average_precision"] is not None]
        rows.append(
            {
                "title": _title(students),
                "per_class": str(per_class) if name != "kd" else "",
                "images": _mean(students, "images", ",.0f"),
                "precision": _mean(students, "precision", ".3f"),
                "recall": _mean(students, "recall", ".3f"),
                "ap": f"{np.mean(ap):.3f}" if ap and ranked else "",
                "prior": f"{np.mean([run['prior']['value'] for run in runs]):.3f}" if ranked else "",
                "top1": _accuracy(students),
                "difference": _difference(students, found.get(reference, {})) if name != reference[0] else "",
                "seeds": str(len(students)),
                "steps": _mean(students, "steps", ",.0f"),
                "seconds": _whole(_seconds(table, students)),
            }
        )
    return rows


def further_rows(table: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of the config's own rows, each compared with `recommended`, which it changes."""
    found = _by_row(table, "steps")
    return [
        {
            "title": name,
            "images": _mean(students, "images", ",.0f"),
            "top1": _accuracy(students),
            "difference": _difference(students, found.get(("recommended", per_class), {})),
            "seeds": str(len(students)),
            "steps": _mean(students, "steps", ",.0f"),
            "seconds": _whole(_seconds(table, students)),
        }
        for (name, per_class), students in found.items()
        if name not in BUILT_IN
    ]


def cost_rows(table: dict[str, Any]) -> list[dict[str, str]]:
    """The cells of what each built-in row cost, means over its students: seconds by stage, and those of CPUs and GPUs.

    Selector and pass hold all of the machine, a student one CPU or one GPU. What makes no difference to a row is not
    counted: a random choice needs no scores, the surest of the teacher need the pass alone. A row without a student on
    the timed device says nothing of the student's seconds, nor of the sums that they are part of.
    """
    found = _by_row(table, "steps")
    machine, first = table["machine"], next(iter(found))[1]
    on_cpu = timed_device(table) == "CPU"
    rows = []
    for (name, per_class), students in found.items():
        if name not in BUILT_IN or per_class != first:
            continue
        needed = spends(BUILT_IN[name])
        runs = [table["runs"][f"{per_class}-seed{seed}"]["seconds"] for seed in students]
        stages = {k: float(np.mean([run[k] for run in runs])) if k in needed else 0.0 for k in STAGES}
        before = sum(stages.values())
        training = _seconds(table, students)
        cpu = gpu = 0.0
        if training is not None:
            cpu = before * machine["cpus"] + training * on_cpu
            gpu = before * machine["gpus"] + training * (not on_cpu)
        top1 = 100 * float(np.mean([s["top1"] for s in students.values()]))
        rows.append(
            {
                "title": _title(students),
                **{k: format(spent, ",.0f") if spent else "" for k, spent in stages.items()},
                "training": _whole(training),
                "cpu": format(cpu, ",.0f") if cpu else "",
                "gpu": format(gpu, ",.0f") if gpu else "",
                "top1": format(top1, ".2f"),
                "rate": "" if training is None else format(top1 / (cpu + gpu), ".3f"),
            }
        )
    return rows


def comparisons(table: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, mean difference with its interval) of the rows that the method is judged by."""
    found = _by_row(table, "steps")
    numbers = list(dict.fromkeys(n for _, n in found))
    lines = []
    for one, other in COMPARED:
        pair = found.get((one, numbers[0])), found.get((other, numbers[0]))
        if pair[0] and pair[1]:
            lines.append((f"{_title(pair[0])} - {_title(pair[1])}", _difference(pair[0], pair[1])))
    for name in ("pu_s1", "recommended"):
        for n in numbers[1:]:
            few, many = found.get((name, n)), found.get((name, numbers[0]))
            if few and many:
                lines.append((f"{_title(many)} at {n} - at {numbers[0]} per class", _difference(few, many)))
    return lines


def lengths(table: dict[str, Any]) -> dict[str, dict[int, float]]:
    """{title: {images seen: top-1}} of the rows that were trained at several lengths, all of one repetition."""
    others = [s for s in table["students"].values() if s["equal"] == "length"]
    of_them = {(s["seed"], s["positives_per_class"]) for s in others}
    usual = [s for s in table["students"].values() if s["equal"] == "steps"]
    found: dict[str, dict[int, float]] = {}
    for student in others + [s for s in usual if (s["seed"], s["positives_per_class"]) in of_them]:
        found.setdefault(student["title"], {})[student["images_seen"]] = student["top1"]
    return {title: dict(sorted(seen.items())) for title, seen in found.items() if len(seen) > 1}


def by_share(tables: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """{title: [(share of relevant images in the corpus, mean top-1)]} of the rows that several of these tables have."""
    found: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        shares = [run["relevant"] for run in table["runs"].values() if run.get("relevant") is not None]
        if not shares:  # none of its rows selects
            continue
        of_rows = _by_row(table, "steps")
        for (name, per_class), students in of_rows.items():
            if name in BUILT_IN and per_class == next(iter(of_rows))[1]:
                top1 = float(np.mean([s["top1"] for s in students.values()]))
                found.setdefault(_title(students), []).append((float(np.mean(shares)), top1))
    return {title: sorted(points) for title, points in found.items() if points[1:]}


def _shares(table: dict[str, Any]) -> dict[str, dict[float, float]]:
    """{title: {share: top1}} of what `by_share` found; JSON keeps it as pairs. Tables of before have none."""
    return {title: dict(points) for title, points in table.get("by_share", {}).items()}


def _cells(what: str, lines: Mapping[str, Mapping[Any, float]], form: str) -> list[list[str]]:
    """A header, with `what` and where the points of the lines are, and a line of top-1 for each; none without lines."""
    at = sorted({n for points in lines.values() for n in points})
    cells = [[title, *(f"{100 * y[n]:.2f}" if n in y else "" for n in at)] for title, y in lines.items()]
    return [[what, *(format(n, form) for n in at)], ["---"] * (1 + len(at)), *cells] if cells else []


def render_table(table: dict[str, Any], command: str) -> str:
    """The page, Markdown; its pictures `table.svg`, `lengths.svg` and `shares.svg` lie beside it."""
    by_equal = {s["equal"] for s in table["students"].values()}
    return render_page(
        "paper.md.j2",
        command=command,
        name=table["name"],
        machine=table["machine"],
        networks=table["networks"],
        devices=sorted({s["device"] for s in table["students"].values() if "device" in s}),
        timed=timed_device(table) if len({_device(s) for s in table["students"].values()}) > 1 else None,
        teacher=f"{100 * table['teacher']['top1']:.2f}",
        repeated=len({s["seed"] for s in table["students"].values()}) > 1,
        batch_size=table["batch_size"],
        reference={"kd": "KD", "all": "all of U"}[_reference(table)[0]],
        tables={equal: table_rows(table, equal) for equal in ("steps", "epochs") if equal in by_equal},
        further=further_rows(table),
        comparisons=comparisons(table),
        costs=cost_rows(table),
        lengths=_cells("images seen", lengths(table), ","),
        shares=_cells("share of relevant images", _shares(table), ".3g"),
        failed=table["failed"],
    )


def draw_accuracy(table: dict[str, Any]) -> bytes:
    """SVG: top-1 against the number of training images, all at equal steps; rows named `series@n` are one line.

    Of the config's own rows only these are drawn: others change how images are learnt from, not which. Of other
    numbers of positives than the first only P alone is drawn, as a line.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=list(colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])))  # the strong ones first
    found = _by_row(table, "steps")
    _, first = next(iter(found))
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for (name, per_class), students in found.items():
        series, at, _ = name.partition("@")
        if not at and (name not in BUILT_IN or (per_class != first and name != "p_only")):
            continue
        images = float(np.mean([s["images"] for s in students.values()]))
        point = images, [100 * s["top1"] for s in students.values()]
        if not any(point in points for points in lines.values()):  # rows that differ in name only
            lines.setdefault(series if at else _title(students), []).append(point)
    for label, points in sorted(lines.items(), key=lambda line: len(line[1]) == 1):
        points.sort(key=lambda point: point[0])
        means = [float(np.mean(v)) for _, v in points]
        spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for _, v in points]
        axes.errorbar(
            [n for n, _ in points],
            means,
            spread,
            label=label,
            marker="o",
            ms=4,
            capsize=2,
            elinewidth=0.8,
            lw=1.2 if points[1:] else 0,
        )
    _draw_teacher(axes, table)
    axes.set_xscale("log")
    return _finish(figure, axes, "training images")


def draw_lengths(table: dict[str, Any]) -> bytes:
    """SVG: top-1 against the images that a student has seen, of the first repetition."""
    figure, axes = _draw_lines(lengths(table))
    _draw_teacher(axes, table)
    axes.set_xscale("log")
    return _finish(figure, axes, "images seen")


def draw_shares(table: dict[str, Any]) -> bytes:
    """SVG: top-1 against the share of relevant images in the corpus."""
    lines = _shares(table)
    figure, axes = _draw_lines(lines)
    at = sorted({n for points in lines.values() for n in points})
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{100 * n:.3g} %" for n in at])
    axes.minorticks_off()
    return _finish(figure, axes, "share of relevant images in the corpus")


def _draw_lines(lines: Mapping[str, Mapping[Any, float]]) -> tuple[Figure, Axes]:
    """A line of top-1 for each title."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for title, points in lines.items():
        axes.plot(list(points), [100 * top1 for top1 in points.values()], marker="o", ms=4, lw=1.2, label=title)
    return figure, axes


def _draw_teacher(axes: Axes, table: dict[str, Any]) -> None:
    axes.axhline(100 * table["teacher"]["top1"], color="grey", lw=0.8, ls=":")
    axes.annotate("teacher", (0.01, 100 * table["teacher"]["top1"]), xycoords=("axes fraction", "data"), va="bottom")


def _finish(figure: Figure, axes: Axes, across: str) -> bytes:
    axes.set(xlabel=across, ylabel="top-1, %")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    sink = io.BytesIO()
    with rc_context({"svg.hashsalt": "pukd_ray"}):  # the same figures, the same file
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()
