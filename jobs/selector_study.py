"""Measure the selector on pools of known truth: default settings, ablations, coverage of the intervals.

Runs that the output file has already are not made again. Fashion-MNIST is read from Debian's package:
`apt-get install dataset-fashion-mnist`.
"""

import argparse
import os
import sys
from pathlib import Path

import pukd_ray.demo
from pukd_ray.demo.pools import load_bank
from pukd_ray.preflight import load_config
from pukd_ray.runtime.engine import engine
from pukd_ray.studies.selector import all_runs, run_study
from pukd_ray.studies.tables import render


def main() -> None:
    """Parse the arguments, make the missing runs, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("docs/results/selector.json"), help="[%(default)s]")
    parser.add_argument("--tables", type=Path, default=Path("docs/results.md"), help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=5, help="of default settings and ablations [%(default)s]")
    parser.add_argument("--coverage-seeds", type=int, default=20, help="[%(default)s]")
    parser.add_argument("--tuning", action="store_true", help="on the tuning pools: nothing final is looked at")
    arguments = parser.parse_args()

    demo = Path(pukd_ray.demo.__path__[0])
    teacher = load_config(demo / "demo.yaml").teacher
    if not arguments.source.is_dir():
        sys.exit(f"{arguments.source} is missing: install dataset-fashion-mnist or name its folder with --source")
    bank = load_bank(arguments.source, os.cpu_count() or 1)
    with engine("selector-study"):
        runs = all_runs(arguments.seeds, arguments.coverage_seeds)
        weights = Path(teacher.weights).read_bytes()
        study = run_study(arguments.output, bank, teacher, weights, runs, tuning=arguments.tuning)
    arguments.tables.write_text(render(study, "python jobs/selector_study.py"), encoding="utf-8")
    print(arguments.tables)


if __name__ == "__main__":
    main()
