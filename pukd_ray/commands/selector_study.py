"""Measure the selector on pools of known truth: default settings, biased positives, rival rules, ablations.

Runs that the output file has already are not made again. Fashion-MNIST is read from Debian's package:
`apt-get install dataset-fashion-mnist`. The pool `cifar` needs a folder of images (docs/results.md says which).
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pukd_ray.demo
from pukd_ray.cli import parse_flags
from pukd_ray.commands.make_pools import add_source, load_source
from pukd_ray.preflight import load_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    add_source(parser)
    data = os.environ.get("PUKD_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(data) if data else None,
        help="folder of the pool cifar; without it that pool is left out [environment variable PUKD_DATA]",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/selector.json"), help="[%(default)s]")
    parser.add_argument("--tables", type=Path, default=Path("docs/results.md"), help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=5, help="[%(default)s]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="instead: every pool with the ablations' settings; writes --output and prints it",
    )
    parser.add_argument(
        "--audited",
        action="store_true",
        help="instead: `hard`, with a biased P too, and what 300 labels make of it; writes --output and prints it",
    )
    parser.add_argument("--tuning", action="store_true", help="on the tuning pools: nothing final is looked at")


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, make the missing runs, write the tables."""
    arguments = parse_flags(argv, __doc__, "pukd selector-study", add_flags)
    # After the arguments: help should not wait for torch and Ray.
    from pukd_ray.demo.pools import MEASURED
    from pukd_ray.runtime.engine import engine
    from pukd_ray.studies.cifar import POOL as CIFAR
    from pukd_ray.studies.cifar import cifar_teacher, load_cifar
    from pukd_ray.studies.selector import Source, all_runs, audited_runs, describe, quick_runs, run_study
    from pukd_ray.studies.tables import render

    teacher = load_config(Path(pukd_ray.demo.__path__[0]) / "demo.yaml").teacher
    fashion = Source(load_source(arguments.source), teacher, Path(teacher.weights).read_bytes())
    sources = dict.fromkeys(MEASURED, fashion)
    if arguments.data is not None:
        sources[CIFAR] = Source(load_cifar(arguments.data), *cifar_teacher(arguments.data))
    runs = (quick_runs if arguments.quick else all_runs)(arguments.seeds, CIFAR in sources)
    if arguments.audited:
        runs = audited_runs(arguments.seeds)
    with engine("selector-study"):
        study = run_study(arguments.output, sources, runs, tuning=arguments.tuning)
    if arguments.quick or arguments.audited:
        for run in runs:
            print(describe(run, study["runs"][run.key]))
        return
    arguments.tables.write_text(render(study, "python jobs/selector_study.py"), encoding="utf-8")
    print(arguments.tables)
