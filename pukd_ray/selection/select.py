"""Stage `select`: copies dropped, the rule applied, `selected/` written in seeded-hash order, estimates made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pukd_ray.config import RunConfig, to_plain
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.units import Unit
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import PRIOR, QualityRecord, SelectionRecord, selection_in
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.metrics import record
from pukd_ray.selection.calibration import from_json
from pukd_ray.selection.chunks import missing_column, missing_columns, score_files
from pukd_ray.selection.copies import find_copies
from pukd_ray.selection.find_cuts import find_cuts
from pukd_ray.selection.histogram import bin_edges, estimate_selection
from pukd_ray.selection.near import find_near
from pukd_ray.selection.rows import SelectJob
from pukd_ray.selection.writing import write_selected

FILES_PER_TASK = 4
MAX_TASKS = 2000  # the driver knows what each of them makes for each part of a shuffle


def run_select(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts."""
    summary = select_images(run.folder, run.config, run.units)
    precision, recall = summary["estimated"]["precision"], summary["estimated"]["recall"]
    return {
        "n_selected": summary["n_selected"],
        "n_duplicates": summary["n_duplicates"],
        "precision (estimated)": "cannot tell" if precision is None else round(precision, 3),
        "recall (estimated)": "cannot tell" if recall is None else round(recall, 3),
    }


def select_images(
    folder: RunFolder, config: RunConfig, units: Sequence[Unit], into: str = "selected"
) -> SelectionRecord:
    """Select, writing to folder `into` of the run; returns what its summary, a file beside it, says."""
    for rule in missing_columns(folder, [config.selection.rule]):
        raise RunError(f"selection.rule: {missing_column(folder, rule)}")
    if folder.exists(selection_in(into).name):  # first: a summary stands for a folder that is whole
        folder.delete(selection_in(into).name)
    folder.delete_folder(into)
    files = score_files(folder)
    size = max(FILES_PER_TASK, -(-len(files) // MAX_TASKS))
    groups = [files[i : i + size] for i in range(0, len(files), size)]
    held_out = folder.read_table("selector/held_out.parquet")
    logits = held_out.column("logit").to_numpy().astype(np.float64)
    of_p = pc.equal(held_out.column("role"), "positives").to_numpy(zero_copy_only=False)
    job = SelectJob(folder, config, bin_edges(logits), into)
    with progress("select", 3 * len(groups), "tasks") as bar:
        dropped, n_scored = find_copies(job, groups, units)
        near_places, near = find_near(job, groups, units, dropped, n_scored)
        dropped += near_places
        bar.update(len(groups))
        cuts = find_cuts(job, groups, dropped, n_scored)
        bar.update(len(groups))
        counts, binned = write_selected(job, groups, dropped, cuts)
        bar.update(len(groups))
    weights = held_out.column("weight").to_numpy()[of_p]
    quality = estimate_selection(
        binned, logits[of_p], weights, *from_json(folder.read_json("selector/calibration.json"))
    )
    told = folder.read_record(PRIOR)["trust"] != "none" and job.rule.known_by_logit
    estimated: QualityRecord = {
        "precision": quality["precision"] if told else None,
        "precision_interval": quality["precision_interval"] if told else None,
        "recall": quality["recall"] if told else None,
        "recall_interval": quality["recall_interval"] if told else None,
    }
    summary: SelectionRecord = {
        **counts,
        "estimated": estimated,
        "rule": config.selection.rule,
        "selection": to_plain(config.selection),
        "near": near,
    }
    if summary["n_selected"] == 0:
        raise RunError(
            f"selection: rule {job.rule.name} takes none of {n_scored:,} scored images: "
            "lower selection.threshold or selection.target_precision, or choose another rule"
            + (f" ({job.rule.if_empty})" if job.rule.if_empty else "")
        )
    budget = config.selection.budget if job.rule.positives_only and "budget" in job.rule.needs else None
    if budget is not None and summary["n_selected"] < budget:
        say(
            f"          warning: only {summary['n_selected']:,} images are positive, fewer than selection.budget = "
            f"{budget:,}: all are taken"
        )
    folder.write_json(selection_in(into).name, summary)
    record("images_selected", summary["n_selected"])
    return summary
