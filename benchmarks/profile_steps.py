"""Where a score task's CPU seconds go: its steps, one after the other in this process, without an engine.

python -m benchmarks.profile_steps --images jpeg=2048 --networks lenet5
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import ray

from benchmarks import ceiling
from benchmarks.corpora import make_corpus
from benchmarks.corpus_pass import add_corpora, sample_of, sizes_asked
from benchmarks.task import Task, prepare
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.corpus.plan import measure_units
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Consume, DecodeImages, LedgerPart, Pass
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import ACTOR_BATCH
from pukd_ray.runtime.engine import engine
from pukd_ray.runtime.timing import take_spans
from pukd_ray.selection import scoring


class Meter:
    """CPU seconds of this process by step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __call__(self, step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(*arguments)`, timed."""
        began = time.process_time()
        try:
            return work(*arguments)
        finally:
            self.seconds[step] += time.process_time() - began

    def each(self, step: str, items: Iterator[Any]) -> Iterator[Any]:
        """`items`, each timed."""
        while (item := self(step, next, items, None)) is not None:
            yield item


def metered(meter: Meter) -> Callable[[RunContext, Pass, Sequence[ReadRequest]], Iterator[LedgerPart]]:
    """Stands for `stream`: the same steps on the same rows, here and timed."""

    def stream(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> Iterator[LedgerPart]:
        actor, decode = work.actor(*work.actor_arguments), DecodeImages(pixel_spec(run.config.teacher))
        consume = Consume(work.consume)
        for request in requests:
            done: list[pa.Table] = []
            for block in meter.each("read", iter(read_blocks(request, run.config.corpus[0]))):
                for start in range(0, block.num_rows, ACTOR_BATCH):
                    decoded = meter("decode", decode, block.slice(start, ACTOR_BATCH))
                    done.append(meter("network", actor, decoded))
            entries, spans = take_spans(meter("write", consume, pa.concat_tables(done)))
            yield LedgerPart(entries.to_pylist(), spans)

    return stream


def profile(run: RunContext) -> dict[str, float]:
    """CPU seconds of each step over the corpus."""
    sources = {"corpus": sources_by_role(run.config)["corpus"]}
    units = measure_units(sources, list_inputs(sources).table, lambda _: None)
    meter = Meter()
    with mock.patch.object(scoring, "stream", metered(meter)):
        scoring.score_corpus(replace(run, units=units))
    return dict(meter.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Print CPU seconds per 1,000 images by step, beside the whole of the hand-written loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpora(parser, "jpeg=2048")
    asked = parser.parse_args(argv)
    for kind, count in sizes_asked(asked):
        for network in asked.networks:
            corpus = make_corpus(asked.cache, kind, count, asked.seed)
            folder: Path = asked.cache / f"profile-{corpus.name}-{network}"
            shutil.rmtree(folder, ignore_errors=True)
            task: Task = prepare(folder, corpus, network, sample_of(corpus))
            (folder / "ceiling").mkdir()
            ceiling.work(0, 1, task, str(folder / "ceiling"))
            _, _, _, alone = json.loads((folder / "ceiling/rank-0.json").read_text())
            with engine("profile") as cluster:
                found = profile(RunContext(RunFolder(str(folder)), task.config, cluster, Shared.of(task.weights)))
            ray.shutdown()
            per = {step: seconds / count * 1000 for step, seconds in found.items()}
            print(
                f"{kind} {network}: CPU s per 1,000 images: "
                + ", ".join(f"{step} {seconds:.3f}" for step, seconds in per.items())
                + f"; in all {sum(per.values()):.3f}; hand-written {alone / count * 1000:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
