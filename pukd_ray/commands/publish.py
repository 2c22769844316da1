"""Write a run's selection and student as a data set and a model of Hugging Face, with cards. Nothing is uploaded."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pukd_ray.cli import parse_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("run", metavar="RUN", help="the run's folder (`output`): a path or a URI")
    parser.add_argument("folder", metavar="FOLDER", help="where dataset/ and model/ are written: a path or a URI")


def main(argv: Sequence[str]) -> None:
    """Parse, write, say."""
    arguments = parse_flags(argv, __doc__, "pukd publish", add_flags)
    # After the arguments: help should not wait for Ray.
    from pukd_ray.preflight import check_folder, config_of_run
    from pukd_ray.report.publish import publish
    from pukd_ray.run.folder import open_run
    from pukd_ray.storage import is_local

    run, target = open_run(arguments.run), open_run(arguments.folder)
    config = config_of_run(run)
    if is_local(target.uri):
        check_folder("arguments: FOLDER", Path(target.root))
    publish(run, config, target)
