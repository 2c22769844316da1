"""This project's score stage, with all that it checks, counts and writes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.task import Task


def driver_mib() -> float:
    """Memory of this process that is its own, now."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def scores_mib(folder: Path) -> dict[str, float]:
    """Size of the table of scores, and of its columns other than the kept images."""
    import pyarrow.parquet as pq

    whole = columns = 0
    for file in folder.glob("*.parquet"):
        facts = pq.read_metadata(file)
        whole += file.stat().st_size
        for group in (facts.row_group(i) for i in range(facts.num_row_groups)):
            parts = [group.column(i) for i in range(group.num_columns)]
            columns += sum(part.total_compressed_size for part in parts if part.path_in_schema != "image")
    return {"scores_mib": whole / 2**20, "columns_mib": columns / 2**20}


def spilled_mib() -> float:
    """What the object stores of the cluster have written to disk so far, for want of room."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return float(get_memory_info_reply(state).store_stats.spilled_bytes_total / 2**20)


def import_libraries() -> None:
    """What a worker imports for the stage: in a run the stage before it has done so, in the same processes."""
    import pyarrow as pa

    import pukd_ray.networks.selector
    import pukd_ray.networks.teacher
    import pukd_ray.selection.scoring  # noqa: F401

    pa.array([0])  # pyarrow looks for pandas when it first makes a column


def main(folder: str, corpus: str, network: str) -> None:
    """Score a corpus as `pukd run` does once the selector is known; prints its seconds as JSON.

    In `start` are the imports of the driver and of all workers, and Ray's start.
    """
    began = time.time()
    task = Task(Path(folder), Path(corpus), network)
    import ray

    from pukd_ray.corpus.context import RunContext, Shared
    from pukd_ray.corpus.listing import list_inputs
    from pukd_ray.corpus.plan import measure_units
    from pukd_ray.corpus.sources import sources_by_role
    from pukd_ray.run.folder import RunFolder
    from pukd_ray.runtime.engine import engine
    from pukd_ray.selection.scoring import score_corpus

    config = task.config
    sources = {"corpus": sources_by_role(config)["corpus"]}
    with engine(config.name) as cluster:
        imports = ray.remote(num_cpus=1)(import_libraries)
        ray.get([imports.remote() for _ in range(int(cluster.cpus))])
        started, memory = time.time(), [driver_mib()]
        run = RunContext(RunFolder(config.output), config, cluster, Shared.of(task.weights))
        run = replace(run, units=measure_units(sources, list_inputs(sources).table, lambda _: None))
        planned = time.time()
        memory.append(driver_mib())
        counts = score_corpus(run)
        ended = time.time()
        memory.append(driver_mib())
        spilled = spilled_mib()
    print(
        json.dumps(
            {
                "images": counts["n_scored"],
                "rejected": counts["n_rejected"],
                "start": started - began,
                "plan": planned - started,
                "stage": ended - planned,
                "computing": counts["computing_seconds"],
                "chunks": counts["chunks"],
                "units": len(run.units),
                "driver_mib": memory,
                "spilled_mib": spilled,
                **scores_mib(task.folder / "scores"),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
