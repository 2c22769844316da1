"""Disturb small runs for as long as asked: kill drivers, workers, nodes, let storage fail; nothing may be lost.

All happens on this machine, on Rays of its own. Prints a line for each run, then what was seen in all.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pukd_ray.cli import at_least, parse_flags
from pukd_ray.config import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("--minutes", type=at_least(0, float), default=60.0, help="how long [%(default)g]")
    parser.add_argument("--faults", type=at_least(1), help="or how many faults")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the faults [%(default)s]")
    parser.add_argument("--folder", type=Path, help="to work in, empty [a temporary one]")


def main(argv: Sequence[str]) -> None:
    """Parse the arguments; disturb."""
    arguments = parse_flags(argv, __doc__, "pukd soak", add_flags)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="pukd-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError([f"arguments: --folder {folder} is not empty: name another"])
    from pukd_ray.soak.running import soak  # after the checks: Ray takes seconds

    soak(folder.absolute(), arguments.minutes, arguments.faults, arguments.seed)
    if arguments.folder is None:
        shutil.rmtree(folder)
