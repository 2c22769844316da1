"""The paper's table for any data set: teacher, students on P, original, random, all and selected images.

Trains the teacher first if its weights are missing and the config says how. What is there already is not made again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pukd_ray.cli import Arguments, parse_arguments
from pukd_ray.errors import RunError
from pukd_ray.storage import split_uri
from pukd_ray.studies.config import PaperConfig, load_paper_table

QUICK = {
    "table.seeds": 2,
    "table.main_seeds": None,
    "table.per_class": [20],
    "table.more": [],
    "table.lengths": [],
    "table.beside": [],
    "selector.steps": 200,
    "distill.steps": 200,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What this command has beside the config's keys."""
    parser.add_argument("--rows", help="built-in rows to make, such as pu_s1,all (table.rows)")
    parser.add_argument("--seeds", type=int, help="repetitions of all rows (table.seeds, for table.main_seeds too)")
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 per class, 200 steps: to see that it runs")


def load(arguments: Arguments) -> PaperConfig:
    """The config with what the flags stand for; `--quick` has its own folder, for it makes no part of the table."""
    flags = arguments.flags
    given: dict[str, Any] = {}
    if flags.rows is not None:
        given["table.rows"] = flags.rows.split(",")
    if flags.seeds is not None:
        given |= {"table.seeds": flags.seeds, "table.main_seeds": None}  # null: as `seeds`
    config = load_paper_table(arguments.config, {**(QUICK if flags.quick else {}), **given, **arguments.overrides})
    if not flags.quick:
        return config
    scheme, path, query = split_uri(config.output)
    return replace(config, output=f"{scheme}{path}-quick{query}")


def main(argv: Sequence[str]) -> None:
    """Parse, check, make what is missing, print."""
    arguments = parse_arguments(argv, __doc__, prog="pukd paper-table", add_flags=add_flags)
    config = load(arguments)
    # After the checks: a bad config should not wait for torch and Ray.
    from pukd_ray.studies.paper import make_table, train_missing_teacher, write_page

    if train_missing_teacher(config):
        config = load(arguments)  # now its weights are checked too
    table = make_table(config)
    print(write_page(config, table, f"python jobs/paper_table.py --config {arguments.config}"))
    if table["failed"]:
        raise RunError(
            f"{len(table['failed'])} parts of the table were not made, see its end; start again to try again"
        )
