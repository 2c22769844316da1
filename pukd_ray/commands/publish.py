"""Write a run's selection and student as a data set and a model of Hugging Face, with cards. Nothing is uploaded."""

import argparse
from collections.abc import Sequence

from pukd_ray.cli import parse_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("run", metavar="RUN", help="the run's folder (`output`): a path or a URI")
    parser.add_argument("folder", metavar="FOLDER", help="where dataset/ and model/ are written: a path or a URI")


def main(argv: Sequence[str]) -> None:
    """Parse, write, say."""
    arguments = parse_flags(argv, __doc__, "pukd publish", add_flags)
    # After the arguments: help should not wait for Ray.
    from pukd_ray.preflight import config_of_run
    from pukd_ray.report.publish import publish
    from pukd_ray.run.folder import open_run

    run = open_run(arguments.run)
    publish(run, config_of_run(run), open_run(arguments.folder))
