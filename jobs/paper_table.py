"""The paper's table for any data set: teacher, students on P, original, random, all and selected images.

Trains the teacher first if its weights are missing and the config says how. What is there already is not made again.
"""

import argparse
import sys
from typing import Any

from pukd_ray.cli import parse_arguments, run_job
from pukd_ray.preflight import load_paper_table

QUICK = {"table.seeds": 2, "table.per_class": [20], "table.more": [], "selector.steps": 200, "distill.steps": 200}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What this job has beside the config's keys."""
    parser.add_argument("--rows", help="built-in rows to make, such as pu_s1,all (table.rows)")
    parser.add_argument("--seeds", type=int, help="repetitions (table.seeds)")
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 per class, 200 steps: to see that it runs")


def overrides_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The config keys that the flags stand for."""
    named = {"table.rows": flags.rows and flags.rows.split(","), "table.seeds": flags.seeds}
    return {**(QUICK if flags.quick else {}), **{key: value for key, value in named.items() if value is not None}}


def main() -> None:
    """Parse, check, make what is missing, print."""
    arguments = parse_arguments(sys.argv[1:], __doc__, add_flags=add_flags)
    overrides = {**overrides_of(arguments.flags), **arguments.overrides}
    config = load_paper_table(arguments.config, overrides)
    # After the checks: a bad config should not wait for torch and Ray.
    from pukd_ray.studies.paper import make_table, train_missing_teacher, write_page

    if train_missing_teacher(config):
        config = load_paper_table(arguments.config, overrides)  # now its weights are checked too
    print(write_page(config, make_table(config), f"python jobs/paper_table.py --config {arguments.config}"))


if __name__ == "__main__":
    sys.exit(run_job(main))
