"""This project's score stage, with all that it checks, counts and writes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.task import Task


def main(folder: str, corpus: str, network: str) -> None:
    """Score a corpus as `pukd run` does once the selector is known; prints its seconds as JSON."""
    began = time.time()
    task = Task(Path(folder), Path(corpus), network)
    from pukd_ray.corpus.context import RunContext, Shared
    from pukd_ray.corpus.plan import list_inputs, measure_units
    from pukd_ray.corpus.sources import sources_by_role
    from pukd_ray.run.folder import RunFolder
    from pukd_ray.runtime.engine import engine
    from pukd_ray.selection.scoring import score_corpus

    config = task.config
    sources = {"corpus": sources_by_role(config)["corpus"]}
    with engine(config.name) as cluster:
        started = time.time()
        run = RunContext(RunFolder(config.output), config, cluster, Shared.of(task.weights))
        run = replace(run, units=measure_units(sources, list_inputs(sources).table, lambda _: None))
        planned = time.time()
        counts = score_corpus(run)
        ended = time.time()
    print(
        json.dumps(
            {
                "images": counts["n_scored"],
                "rejected": counts["n_rejected"],
                "start": started - began,
                "plan": planned - started,
                "stage": ended - planned,
                "computing": counts["computing_seconds"],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
