"""What a run would do, before it does anything: listings, footers and markers, without Ray; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from pukd_ray.config import RunConfig, SourceConfig
from pukd_ray.corpus.files import SourceFile
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.plan import measure
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.estimate import lines_of
from pukd_ray.resume import Progress, check_progress
from pukd_ray.run.ahead import duration, expected_seconds
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import ESTIMATE
from pukd_ray.run.stages import STAGES

FOOTERS = 64
"""Files of a source whose footers are read; what there is beyond them is concluded from their sizes."""
READ_THREADS = 16


def outline_run(folder: RunFolder, config: RunConfig, redo: str | None = None) -> list[str]:
    """Inputs with counts, stages, resources and cost, for people; faults as the run itself would raise them."""
    progress = check_progress(folder, config, redo, STAGES, dry=True)
    r = config.resources
    cluster = os.environ.get("RAY_ADDRESS")
    lines = [f"dry run   of {config.name} into {folder.display}: nothing is started, nothing is written"]
    lines += [f"          {remark}" for remark in progress.listing.remarks]
    lines += _inputs(folder, config, progress)
    lines.append(f"networks  teacher {config.teacher.arch}, student {config.student.arch}")
    lines += _stages(folder, progress)
    lines.append(
        f"resources gpus_per_actor {_shown(r.gpus_per_actor)}, score_actors {_shown(r.score_actors)}, train_workers "
        f"{r.train_workers}; on "
        + (f"the cluster at {cluster}" if cluster else f"a private Ray on this machine ({os.cpu_count()} CPUs)")
    )
    estimate = folder.find_record(ESTIMATE)
    lines += lines_of(estimate) if estimate else ["cost      not estimated: `pukd estimate` makes two small trials"]
    return lines


def _shown(value: object) -> str:
    return " to ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _stages(folder: RunFolder, progress: Progress) -> Iterator[str]:
    """A line for each: done, or what it will take and leave."""
    found = folder.find_record(ESTIMATE)
    expected = expected_seconds(found)
    pending = {stage.name for stage in progress.pending}
    for stage in STAGES:
        marker = folder.marker(stage.name)
        if stage.name not in pending and marker is not None:
            yield f"{stage.name:<9} done in {duration(marker['seconds'])}: skipped"
            continue
        if stage.name not in pending:  # not asked for
            continue
        seconds = f", estimated {duration(expected[stage.name])}" if stage.name in expected else ""
        yield f"{stage.name:<9} to do{seconds}: leaves {', '.join(stage.outputs)}"


def _inputs(folder: RunFolder, config: RunConfig, progress: Progress) -> Iterator[str]:
    """A line for each source: files, bytes, images."""
    plan = folder.marker("plan")
    planned: Mapping[str, int] = plan["counts"] if plan and all(s.name != "plan" for s in progress.pending) else {}
    listing = progress.listing.table
    for role, sources in sources_by_role(config).items():
        for index, source in enumerate(sources):
            mine = listing.filter(
                (pa.compute.field("role") == role) & (pa.compute.field("source") == index)
            ).to_pylist()
            files = [SourceFile(r["uri"], r["relative"], r["size"], r["mtime"]) for r in mine]
            form = mine[0]["format"]
            images = (
                f"{planned[role]:,} images, as planned"
                if role in planned and len(sources) == 1
                else count_images(files, form, source)
            )
            size = sum(file.size for file in files) / 2**20
            key = role if len(sources) == 1 else f"{role}.{index}"
            yield f"{key:<9} {len(files):,} files of {form}, {size:,.1f} MiB: {images}"


def count_images(files: Sequence[SourceFile], form: str, source: SourceConfig) -> str:
    """Images of a source, for people: counted where footers or names tell, concluded from sizes where files are many.

    What must be read to be counted is not.
    """
    if FORMATS[form].read_to_count:
        return "not counted, since its files must be read for that"
    chosen = files if FORMATS[form].single_images else files[:: -(-len(files) // FOOTERS)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        facts = list(pool.map(partial(measure, format_name=form, source=source), chosen))
    rows = sum(fact.rows for fact in facts)
    about = ""
    if len(chosen) < len(files):
        rows = round(rows * sum(file.size for file in files) / max(1, sum(file.size for file in chosen)))
        about = "about "
    if source.rows is not None:
        rows = max(0, min(rows, source.rows[1]) - source.rows[0])
    broken = [(file, fact.error) for file, fact in zip(chosen, facts, strict=True) if fact.error]
    fault = f"; {len(broken):,} files cannot be read, such as {broken[0][0].uri}: {broken[0][1]}" if broken else ""
    first = f", of which the first {source.per_class:,} of each class" if source.per_class else ""
    return f"{about}{rows:,} images{first}{fault}"
