"""The selection counted and written."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from pukd_ray.run.records import SelectionCounts, SelectionTruth
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.average_precision import average_precision, count_truth
from pukd_ray.selection.cuts import Cut
from pukd_ray.selection.histogram import BINNED, bin_scores
from pukd_ray.selection.moving import move_selected
from pukd_ray.selection.rows import SelectJob, load_rows


def write_selected(
    job: SelectJob, groups: list[list[str]], dropped: list[ray.ObjectRef], cuts: dict[int, Cut]
) -> tuple[SelectionCounts, dict[str, np.ndarray]]:
    """Write the selected rows of `groups` of score files; returns the counts, and the scores as of `bin_scores`."""
    refs = [_summarise.remote(job, g, t, cuts, *dropped) for t, g in enumerate(groups)]
    counted = ray.get([counts for counts, _ in refs])
    hashes = min(counts.pop("lowest") for counts in counted), max(counts.pop("highest") for counts in counted)
    total = {k: sum(counts[k] for counts in counted) for k in counted[0]}
    written, parts = move_selected(job, groups, dropped, cuts, int(total["n_selected"]), hashes)
    if written != total["n_selected"]:
        raise RuntimeError(f"{written} of {total['n_selected']} selected images were written: start again")
    in_bin = np.maximum(total["all"], 1)
    truth: SelectionTruth | None = None
    if total["truth"]:
        truth = {
            "precision": total["selected_relevant"] / total["selected_truth"] if total["selected_truth"] else None,
            "recall": total["selected_relevant"] / total["relevant"] if total["relevant"] else None,
            "average_precision": average_precision([keys for _, keys in refs]),
            "relevant": total["relevant"],
            "selected_relevant": total["selected_relevant"],
        }
    counts: SelectionCounts = {
        "n_scored": int(total["n_scored"]),
        "n_duplicates": int(total["n_duplicates"]),
        "n_selected": int(total["n_selected"]),
        "n_positive": int(total["n_positive"]),
        "n_above_half": int(total["n_above_half"]),
        "class_counts": total["class_counts"].tolist(),
        "truth": truth,
        "histogram": {
            "logit": (total["logit_sum"] / in_bin).tolist(),
            "edges": job.edges[1:-1].tolist(),
            "all": total["all"].tolist(),
            "selected": total["selected"].tolist(),
            "relevant": total["relevant_histogram"].tolist() if total["truth"] else None,
        },
        "parts": parts,
    }
    return counts, {name: total[name] for name in BINNED}


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _summarise(
    job: SelectJob, files: list[str], task: int, cuts: dict[int, Cut], *dropped: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """(counts, `count_truth` of the rows with truth)."""
    rows = load_rows(job, files, task, dropped)
    taken = rows.taken(cuts)
    truth = rows.table.column("relevant")
    known = truth.is_valid().to_numpy(zero_copy_only=False)
    relevant = rows.scores.relevant
    everything = job.folder.read_table  # unreadable rows count in the recall's denominator
    relevant_all = sum(
        int(np.sum(everything(f, ["relevant"]).column("relevant").fill_null(False).to_numpy(zero_copy_only=False)))
        for f in files
    )
    classes = job.config.teacher.num_classes
    z, label = rows.scores.pu_logit, rows.scores.teacher_label
    soft = np.bincount(label[taken], minlength=classes)
    order = rows.scores.tie_breaker[taken].view(np.uint64)
    counts = {
        "n_scored": len(z),
        "n_duplicates": rows.copies,
        "n_selected": int(taken.sum()),
        "n_positive": int((z > 0).sum()),
        "n_above_half": int((rows.scores.pu_probability > 0.5).sum()),
        "class_counts": soft,
        **bin_scores(z, taken, job.edges),
        "relevant_histogram": np.histogram(z[relevant], job.edges)[0],
        "truth": int(known.sum()),
        "relevant": relevant_all,
        "selected_truth": int((taken & known).sum()),
        "selected_relevant": int((taken & relevant).sum()),
        "lowest": int(order.min(initial=2**64 - 1)),
        "highest": int(order.max(initial=0)),
    }
    return counts, count_truth(rows.bits[known], relevant[known])
