"""Measure how often the 90 % intervals hold the truth and a biased P is seen, on hundreds of small tasks.

Runs that the output file has already are not made again. Fashion-MNIST is read from Debian's package:
`apt-get install dataset-fashion-mnist`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pukd_ray.demo
from pukd_ray.cli import parse_flags
from pukd_ray.commands.make_pools import add_source, check_source
from pukd_ray.config import ConfigError
from pukd_ray.demo.pools import load_photographs
from pukd_ray.preflight import load_config


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    add_source(parser)
    parser.add_argument("--output", type=Path, default=Path("docs/results/coverage.json"), help="[%(default)s]")
    parser.add_argument("--tables", type=Path, default=Path("docs/coverage.md"), help="[%(default)s]")
    parser.add_argument("--test-seeds", type=int, default=20, help="of the test for a biased P [%(default)s]")
    parser.add_argument("--keep", type=Path, help="folder for what each run's figures are from, pickled")
    parser.add_argument("--tuning", action="store_true", help="other tasks: nothing final is looked at")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="only every Nth run, from the Ith on [%(default)s]"
    )


def parse_part(text: str) -> slice:
    """`I/N`, 1 <= I <= N, as a slice."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ConfigError([f"arguments: --part {text} is not I/N with I from 1 to N"])
    return slice(int(i) - 1, None, int(n))


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, make the missing runs, write the tables."""
    arguments = parse_flags(argv, __doc__, "pukd coverage-study", add_flags)
    part = parse_part(arguments.part)
    check_source(arguments.source, "train")
    # After the arguments: help should not wait for torch and Ray.
    from pukd_ray.runtime.engine import engine
    from pukd_ray.studies.coverage import BiasRun, Case, Photographs, bias_runs, draw_cases, run_study
    from pukd_ray.studies.coverage_page import render

    teacher = load_config(Path(pukd_ray.demo.__path__[0]) / "demo.yaml").teacher
    tuning = arguments.tuning
    runs: list[BiasRun | Case] = [*bias_runs(arguments.test_seeds, tuning=tuning), *draw_cases(tuning=tuning)]
    photographs = Photographs.load(load_photographs(arguments.source), teacher)
    with engine("coverage-study"):
        study = run_study(arguments.output, photographs, runs[part], tuning=tuning, keep=arguments.keep)
    arguments.tables.write_text(render(study, arguments.output.name), encoding="utf-8")
    print(arguments.tables)
