"""Measure the selector on pools of known truth: default settings, ablations, coverage of the intervals.

Runs that the output file has already are not made again. Fashion-MNIST is read from Debian's package:
`apt-get install dataset-fashion-mnist`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pukd_ray.demo
from pukd_ray.cli import parse_flags
from pukd_ray.commands.make_pools import add_source, load_source
from pukd_ray.preflight import load_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    add_source(parser)
    parser.add_argument("--output", type=Path, default=Path("docs/results/selector.json"), help="[%(default)s]")
    parser.add_argument("--tables", type=Path, default=Path("docs/results.md"), help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=5, help="of default settings and ablations [%(default)s]")
    parser.add_argument("--coverage-seeds", type=int, default=20, help="[%(default)s]")
    parser.add_argument(
        "--biased", type=int, metavar="SEEDS", help="instead: `hard` with a biased P; writes --output and prints it"
    )
    parser.add_argument("--tuning", action="store_true", help="on the tuning pools: nothing final is looked at")


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, make the missing runs, write the tables."""
    arguments = parse_flags(argv, __doc__, "pukd selector-study", add_flags)
    # After the arguments: help should not wait for torch and Ray.
    from pukd_ray.runtime.engine import engine
    from pukd_ray.studies.selector import all_runs, biased_runs, describe, run_study
    from pukd_ray.studies.tables import render

    demo = Path(pukd_ray.demo.__path__[0])
    teacher = load_config(demo / "demo.yaml").teacher
    bank = load_source(arguments.source)
    with engine("selector-study"):
        if arguments.biased:
            runs = biased_runs(arguments.biased)
        else:
            runs = all_runs(arguments.seeds, arguments.coverage_seeds)
        weights = Path(teacher.weights).read_bytes()
        study = run_study(arguments.output, bank, teacher, weights, runs, tuning=arguments.tuning)
    if arguments.biased:
        for run in runs:
            print(describe(run, study["runs"][run.key]))
        return
    arguments.tables.write_text(render(study, "python jobs/selector_study.py"), encoding="utf-8")
    print(arguments.tables)
