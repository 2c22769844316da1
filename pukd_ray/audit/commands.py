"""The two commands: draw a sample to label, and read the labels back."""

from __future__ import annotations

from pukd_ray.audit.drawing import draw_sample, save_sample
from pukd_ray.audit.forms import CSV, INTERFACE, PAGE, TASKS, read_labels, write_forms
from pukd_ray.audit.record import SAMPLE, AuditRecord, Design, FigureRecord, save_audit
from pukd_ray.config import RunConfig
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import say
from pukd_ray.runtime.engine import engine


def draw_audit(folder: RunFolder, config: RunConfig, *, images: int = 300, seed: int | None = None) -> Design:
    """Draw `images` of the scored images, stratified around the cut, and write what is needed to label them.

    Which ones depends on the scores, the selection, the ids and the seed (the run's, if none is given). RunError if an
    audit is there: somebody may be labelling it. Needs a cluster, see `draw`.
    """
    if folder.exists(SAMPLE):
        raise RunError(
            f"{folder.display}/audit holds a sample already: label that one, or move the folder away to draw another"
        )
    sample, design = draw_sample(folder, config, images, config.seed if seed is None else seed)
    write_forms(folder, config, sample, design["audit"])
    save_sample(folder, sample, design)
    return design


def draw(folder: RunFolder, config: RunConfig, *, images: int = 300, seed: int | None = None) -> None:
    """`draw_audit` on the cluster of RAY_ADDRESS or a private one, and what to do next."""
    with engine(config.name):
        design = draw_audit(folder, config, images=images, seed=seed)
    where = folder.display
    unreadable = f" ({design['n_unreadable']:,} unreadable ones are left out)" if design["n_unreadable"] else ""
    say(f"audit     {design['audit']}: {min(images, design['n_scored'])} of {design['n_scored']:,} images{unreadable}")
    say(f"label     {where}/{PAGE} in a browser: y, n, u, then Save file")
    say(f"or        fill in the last column of {where}/{CSV} with yes, no or unsure")
    say(f"or        import {where}/{TASKS} into Label Studio, labelling interface {where}/{INTERFACE}; export as JSON")
    say("then      read that file back; a part of the images is enough to begin with, in the order shown")


def take_back(folder: RunFolder, path: str) -> AuditRecord:
    """Read labels from `path`, write `audit/audit.json` and `audit/labels.parquet`, and say what they tell."""
    record = save_audit(folder, read_labels(folder, path))
    left = record["sampled"] - record["labelled"] - record["unsure"]
    say(
        f"audit     {record['design']['audit']}: {record['labelled']} labelled, {record['unsure']} unsure"
        + (f", {left} to go" if left else "")
    )
    for name, figure in (("prior", record["prior"]), ("precision", record["precision"]), ("recall", record["recall"])):
        say(f"{name:<9} {_shown(figure)}")
    return record


def _shown(figure: FigureRecord) -> str:
    if figure["value"] is None:
        return f"cannot tell: {figure['reason']}"
    return f"{figure['value']:.4f}, 90 % interval {figure['lower']:.4f} to {figure['upper']:.4f}"
