"""The last lines of a run."""

from __future__ import annotations

from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import METRICS, Interval, MetricsRecord, NetworkName

NAMES: dict[NetworkName, str] = {
    "teacher": "teacher",
    "student": "student (P + selected)",
    "student_last": "student (last weights)",
    "baseline_positives": "student (P alone, same steps)",
}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def audited(metrics: MetricsRecord) -> dict[str, tuple[float, Interval]]:
    """Figures of the run's audit by name: those that its labels can tell, of the selection that the run has."""
    audit = metrics.get("audit")
    if audit is None:
        return {}
    figures = {"prior": (audit["prior"], audit["prior_interval"])}
    if audit["current"]:
        figures["precision"] = audit["precision"], audit["precision_interval"]
        figures["recall"] = audit["recall"], audit["recall_interval"]
    return {name: (value, bounds) for name, (value, bounds) in figures.items() if value is not None and bounds}


def _times(metrics: MetricsRecord) -> str:
    seconds, computing = metrics.get("seconds", {}), metrics.get("computing_seconds", {})
    split = ", ".join(f"{stage} {s:.0f} ({computing[stage]:.0f})" for stage, s in seconds.items())
    total, busy = sum(seconds.values()), sum(computing.values())
    return f"seconds (of them computing, the rest is engine start): {split}; in all {total:.0f} ({busy:.0f})"


def summary_lines(folder: RunFolder) -> list[str]:
    """Networks, prior, selection and time of a finished run, and where its report is."""
    metrics = folder.read_record(METRICS)
    prior, selection, estimated = metrics["prior"], metrics["selection"], metrics["selection_estimated"]
    true_prior = (folder.read_json("selector/prior.json") or {}).get("true_in_sample")
    lines = ["", f"{'network':<32}{'top-1':>8}{'top-5':>8}{'parameters':>14}"]
    for key, name in NAMES.items():
        if key in metrics:
            n = metrics[key]
            lines.append(f"{name:<32}{_share(n['top1']):>8}{_share(n['top5']):>8}{n['parameters']:>14,}")
    audit, labelled = audited(metrics), metrics.get("audit")
    lines += [
        "",
        f"{'selection':<32}{'true':>8}{'estimated':>11}  90 % interval"
        + (f"   audit ({labelled['n_labelled']:,} labels)" if labelled else ""),
    ]
    trust = metrics["trust"]
    told = trust["level"] != "none"
    given = " (given)" if prior["source"] == "config" else ""
    for name, shown, truth, value, bounds in (
        ("prior", f"prior{given}", true_prior, prior["value"] if told else None, [prior["lower"], prior["upper"]]),
        ("precision", "precision", selection["precision"], estimated["precision"], estimated["precision_interval"]),
        ("recall", "recall", selection["recall"], estimated["recall"], estimated["recall_interval"]),
    ):
        figures = f"{'cannot tell':>12}{'':15}"
        if told and name != "prior":
            figures = f"{'cannot tell':>12}  of this rule "
        if value is not None and bounds is not None:
            figures = f"{value:>11.4f}  {_interval(bounds)}"
        known = f"  {audit[name][0]:.4f}  {_interval(audit[name][1])}" if name in audit else ""
        lines.append(f"{shown:<32}{_share(truth):>8}{figures}{known}".rstrip())
    lines.append(f"{'trust in the estimates':<32}{trust['level']:>8}  {'; '.join(trust['reasons'])}".rstrip())
    rejected = ", ".join(f"{n} {reason}" for reason, n in metrics["rejected_by_reason"].items()) or "none"
    lines += [
        f"{'average precision':<32}{_share(selection['average_precision']):>8}",
        "",
        f"selected {metrics['n_selected']:,} of {metrics['n_corpus']:,} images; "
        f"{metrics['n_duplicates']:,} copies dropped; unreadable: {rejected}",
        _times(metrics),
        f"report: {folder.display}/report.html",
    ]
    return lines
