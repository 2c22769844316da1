"""How far a run is, and what is left of it: read from its folder alone, on any machine, while it runs or after."""

import argparse
from collections.abc import Sequence

from pukd_ray.cli import parse_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("run", metavar="RUN", help="the run's folder (`output`): a path or a URI")


def main(argv: Sequence[str]) -> None:
    """Parse, read, print."""
    arguments = parse_flags(argv, __doc__, "pukd status", add_flags)
    # After the arguments: help should not wait for Ray.
    from pukd_ray.report.status import status_lines
    from pukd_ray.run.folder import open_run

    print("\n".join(status_lines(open_run(arguments.run))))
