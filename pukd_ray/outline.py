"""What a run would do, before it does anything: listings, footers and markers, without Ray; nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pukd_ray.config import RunConfig, SourceConfig
from pukd_ray.corpus.files import SourceFile
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.plan import measure
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.tables import pieces
from pukd_ray.estimate import lines_of
from pukd_ray.preflight import check_folder
from pukd_ray.resume import Progress, check_progress
from pukd_ray.run.ahead import duration, expected_seconds
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import ESTIMATE
from pukd_ray.run.stages import STAGES
from pukd_ray.selection.near import NEAR_FILE
from pukd_ray.storage import is_local

FOOTERS = 64
"""Files of a source whose footers are read; what there is beyond them is concluded from their sizes."""
READ_THREADS = 16


def outline_run(folder: RunFolder, config: RunConfig, redo: str | None = None) -> list[str]:
    """Inputs with counts, stages, resources and cost, for people; faults as the run itself would raise them."""
    if is_local(folder.uri):
        check_folder("output:", Path(folder.root))
    progress = check_progress(folder, config, redo, STAGES, dry=True)
    r = config.resources
    cluster = os.environ.get("RAY_ADDRESS")
    lines = [f"dry run   of {config.name} into {folder.display}: nothing is started, nothing is written"]
    lines += [f"          {remark}" for remark in progress.listing.remarks]
    lines += _inputs(folder, config, progress)
    start = f" from {config.student.start}" if config.student.start else ""
    lines.append(f"networks  teacher {config.teacher.arch}, student {config.student.arch}{start}")
    lines += _stages(folder, config, progress)
    lines.append(
        f"resources gpus_per_actor {_shown(r.gpus_per_actor)}, score_actors {_shown(r.score_actors)}, train_workers "
        f"{_shown(r.train_workers)}; on "
        + (f"the cluster at {cluster}" if cluster else f"a private Ray on this machine ({os.cpu_count()} CPUs)")
    )
    estimate = folder.find_record(ESTIMATE)
    lines += lines_of(estimate) if estimate else ["cost      not estimated: `pukd estimate` makes small trials"]
    return lines


def _shown(value: object) -> str:
    return " to ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _stages(folder: RunFolder, config: RunConfig, progress: Progress) -> Iterator[str]:
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
        left = [name for name in stage.outputs if name != NEAR_FILE or config.selection.deduplicate == "near"]
        yield f"{stage.name:<9} to do{seconds}: leaves {', '.join(left)}"


def _inputs(folder: RunFolder, config: RunConfig, progress: Progress) -> Iterator[str]:
    """A line for each source: files, bytes, images."""
    plan = folder.marker("plan")
    planned: Mapping[str, int] = plan["counts"] if plan and all(s.name != "plan" for s in progress.pending) else {}
    for role, sources in sources_by_role(config).items():
        for index, source in enumerate(sources):
            is_mine = (pc.field("role") == role) & (pc.field("source") == index)
            mine = [piece.filter(is_mine) for piece in pieces(progress.listing.table)]
            files, size = sum(map(len, mine)), sum(pc.sum(piece.column("size")).as_py() or 0 for piece in mine)
            form = next(piece.column("format")[0].as_py() for piece in mine if len(piece))
            if role in planned and len(sources) == 1:
                images = f"{planned[role]:,} images, as planned"
            else:
                images = count_images(mine, form, source)
            key = role if len(sources) == 1 else f"{role}.{index}"
            yield f"{key:<9} {files:,} files of {form}, {size / 2**20:,.1f} MiB: {images}"


def count_images(files: Sequence[pa.Table], form: str, source: SourceConfig) -> str:
    """Images of a source's files, for people: counted where names or footers tell, concluded from sizes where files
    are many. What must be read to be counted is not."""
    if FORMATS[form].read_to_count:
        return "not counted, since its files must be read for that"
    number, size = sum(map(len, files)), sum(pc.sum(piece.column("size")).as_py() or 0 for piece in files)
    rows, about, fault = number, "", ""
    if not FORMATS[form].single_images:
        step, chosen, seen = -(-number // FOOTERS), list[SourceFile](), 0
        for piece in files:
            some = piece.take(np.arange(-seen % step, len(piece), step)).select(["uri", "relative", "size", "mtime"])
            chosen += map(SourceFile, *(column.to_pylist() for column in some.columns))
            seen += len(piece)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            facts = list(pool.map(partial(measure, format_name=form, source=source), chosen))
        rows = sum(fact.rows for fact in facts)
        if len(chosen) < number:
            rows, about = round(rows * size / max(1, sum(file.size for file in chosen))), "about "
        broken = [f"{file.uri}: {fact.error}" for file, fact in zip(chosen, facts, strict=True) if fact.error]
        fault = f"; {len(broken):,} files cannot be read, such as {broken[0]}" if broken else ""
    if source.rows is not None:
        rows = max(0, min(rows, source.rows[1]) - source.rows[0])
    first = f", of which the first {source.per_class:,} of each class" if source.per_class else ""
    return f"{about}{rows:,} images{first}{fault}"
