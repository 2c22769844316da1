"""The two commands: draw a sample to label, and read the labels back."""

from __future__ import annotations

from pukd_ray.audit.drawing import check_selection, draw_sample, save_sample
from pukd_ray.audit.forms import CSV, FIFTYONE, INTERFACE, PAGE, TASKS, read_labels, write_forms
from pukd_ray.audit.record import (
    SAMPLE,
    AuditRecord,
    Design,
    FigureRecord,
    is_current,
    load_sample,
    save_audit,
    summarise_audit,
)
from pukd_ray.config import RunConfig
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import METRICS
from pukd_ray.runtime.console import say
from pukd_ray.runtime.engine import engine
from pukd_ray.selection.labels import label_records


def draw(folder: RunFolder, config: RunConfig, *, images: int = 300, seed: int | None = None) -> Design:
    """Draw `images` of the scored images, stratified around the cut, write what is needed to label them, say what next.

    Which ones depends on the scores, the selection, the ids and the seed (if none is given the run's, and another for
    each further audit). An audit of an earlier selection moves to `old/`, its labels stay in `labels/`; RunError if
    there is one of this selection: somebody may be labelling it. RunError too if the run has no finished selection. On
    the cluster of RAY_ADDRESS or a private one.
    """
    check_selection(folder)
    there = folder.exists(SAMPLE)
    if there and is_current(folder, load_sample(folder)[1]):
        raise RunError(
            f"{folder.display}/audit holds a sample already: label that one, or move the folder away to draw another"
        )
    with engine(config.name):
        # An earlier draw's labels may have trained this selector: with the same seed their images would be drawn again.
        seed = config.seed + len(label_records(folder)) if seed is None else seed
        sample, design = draw_sample(folder, config, images, seed)
        if there:
            say(f"          the audit of an earlier selection moved to {folder.set_aside(['audit'])}")
        write_forms(folder, config, sample, design["audit"])
        save_sample(folder, sample, design)
    where = folder.display
    unreadable = f" ({design['n_unreadable']:,} unreadable ones are left out)" if design["n_unreadable"] else ""
    say(f"audit     {design['audit']}: {min(images, design['n_scored'])} of {design['n_scored']:,} images{unreadable}")
    say(f"label     {where}/{PAGE} in a browser: y, n, u, then Save file")
    say(f"or        fill in the last column of {where}/{CSV} with yes, no or unsure")
    say(f"or        import {where}/{TASKS} into Label Studio, labelling interface {where}/{INTERFACE}; export as JSON")
    say(f"or        open {where}/{FIFTYONE} in FiftyOne (docs/integrations.md); export its labels.json")
    say("then      pukd audit read, with the same config and that file; part of it will do, in the order shown")
    return design


def take_back(folder: RunFolder, path: str) -> AuditRecord:
    """Read labels from `path`, write the run's `labels/` and `audit/audit.json`, and say what they tell.

    A `metrics.json` that is there gets the figures too. RunError if no sample was drawn, or the file is not of it.
    """
    record = save_audit(folder, read_labels(folder, path))
    metrics = folder.find_record(METRICS)
    if metrics is not None:
        metrics["audit"] = summarise_audit(folder)
        folder.write_record(METRICS, metrics)
    left = record["sampled"] - record["labelled"] - record["unsure"]
    say(
        f"audit     {record['design']['audit']}: {record['labelled']} labelled, {record['unsure']} unsure"
        + (f", {left} to go" if left else "")
    )
    for name, figure in (("prior", record["prior"]), ("precision", record["precision"]), ("recall", record["recall"])):
        say(f"{name:<9} {_shown(figure)}")
    if not is_current(folder, record["design"]):
        say("          precision and recall are of an earlier selection: draw again to audit this one")
    return record


def _shown(figure: FigureRecord) -> str:
    if figure["value"] is None:
        return f"cannot tell: {figure['reason']}"
    return f"{figure['value']:.4f}, 90 % interval {figure['lower']:.4f} to {figure['upper']:.4f}"
