"""What a run says of single images, by their ids: prints their rows and writes their pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pukd_ray.cli import parse_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("run", metavar="RUN", help="the run's folder (`output`): a path or a URI")
    parser.add_argument(
        "ids", metavar="ID", nargs="+", help="an `image_id` of scores/, such as the report's gallery has"
    )
    parser.add_argument(
        "--pictures", type=Path, default=Path("pictures"), help="folder to write them into, as encoded [%(default)s]"
    )


def main(argv: Sequence[str]) -> None:
    """Parse, find, print."""
    arguments = parse_flags(argv, __doc__, "pukd show", add_flags)
    # After the arguments: help should not wait for Ray.
    from pukd_ray.preflight import check_folder, config_of_run
    from pukd_ray.report.show import show_lines
    from pukd_ray.run.folder import open_run

    check_folder("arguments: --pictures", arguments.pictures)
    folder = open_run(arguments.run)
    print("\n".join(show_lines(folder, config_of_run(folder), arguments.ids, arguments.pictures)))
