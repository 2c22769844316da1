"""Know, instead of estimate, what a run's selection is worth: a person labels a small sample of the scored images.

`pukd audit draw` draws it and writes a page to label it on, `pukd audit read` takes the labels back. Both take the
run's config; without one, the bundled demo's.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import Any

from pukd_ray.cli import DEMO_CONFIG, Arguments, Parser, parse_arguments
from pukd_ray.config import ConfigError, RunConfig
from pukd_ray.preflight import load_config
from pukd_ray.run.folder import RunFolder

ACTIONS = {
    "draw": "Draw images to label, and write a page, a CSV file and Label Studio tasks to label them with.",
    "read": "Read LABELS back (of the page, CSV or Label Studio's JSON): prior, precision and recall with intervals.",
}


def main(argv: Sequence[str]) -> None:
    """Parse, check, draw or read."""
    parser = Parser(
        prog="pukd audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", metavar="{draw,read}", required=True)
    for name, text in ACTIONS.items():
        actions.add_parser(name, help=text, add_help=False)
    action = parser.parse_args(argv[:1]).action  # the rest is the action's own
    (_draw if action == "draw" else _read)(argv[1:])


def _draw(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, ACTIONS["draw"], prog="pukd audit draw", demo=True, add_flags=_add_images)
    folder, config = _open(arguments)
    from pukd_ray.audit.commands import draw

    draw(folder, config, images=arguments.flags.images)


def _read(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, ACTIONS["read"], prog="pukd audit read", demo=True, operand="LABELS")
    folder, config = _open(arguments)
    from pukd_ray.audit.commands import take_back
    from pukd_ray.report.page import REPORT, write_page
    from pukd_ray.runtime.console import say
    from pukd_ray.runtime.engine import engine

    record = take_back(folder, arguments.operand)
    if folder.exists(REPORT):
        with engine(config.name):
            write_page(folder, config)
        say(f"report    {folder.display}/{REPORT} has these figures beside the estimates")
    if record["prior"]["value"] is not None:
        say(f"next      the labels serve the selector too: {_again(arguments)}")


def _again(arguments: Arguments) -> str:
    """The command that trains the selector with the labels."""
    given = {**arguments.overrides, "selector.prior": "audit"}
    config = [] if arguments.config == DEMO_CONFIG else ["--config", str(arguments.config)]
    flags = [part for key, value in given.items() for part in (f"--{key}", _as_argument(value))]
    return shlex.join(["pukd", "run", *config, *flags, "--redo", "selector"])


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=300, help="how many to draw [%(default)s]")


def _open(arguments: Arguments) -> tuple[RunFolder, RunConfig]:
    """The run's folder and config; ConfigError if the folder holds results of another config."""
    config = load_config(arguments.config, arguments.overrides)
    # After the checks: a bad config should not wait for Ray.
    from pukd_ray.pipeline import open_folder
    from pukd_ray.resume import StaleResultsError, check_unchanged

    folder = open_folder(config)
    try:
        check_unchanged(folder, config)
    except StaleResultsError as error:  # its own advice is a flag of `pukd run`
        raise ConfigError([fault.replace("--redo ", "pukd run --redo ") for fault in error.faults]) from error
    return folder, config
