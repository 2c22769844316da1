"""Make the bundled demo data, or the glyphs for the run on all images.

Fashion-MNIST is read from Debian's package: `apt-get install dataset-fashion-mnist`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pukd_ray.demo
from pukd_ray.cli import parse_flags
from pukd_ray.commands.make_pools import check_source
from pukd_ray.demo.build import build_demo, build_full_glyphs


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four IDX files [%(default)s]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(pukd_ray.demo.__path__[0]),
        help="folder for the bundled files [the package's own]",
    )
    parser.add_argument(
        "--full",
        type=Path,
        metavar="FOLDER",
        help="write only glyphs.parquet, for the run on all images, into this folder",
    )


def main(argv: Sequence[str]) -> None:
    """Parse the arguments and write the files."""
    arguments = parse_flags(argv, __doc__, "pukd make-demo-data", add_flags)
    if arguments.full:
        print(build_full_glyphs(arguments.full))
        return
    check_source(arguments.source, "train", "t10k")
    manifest = build_demo(arguments.source, arguments.output)
    for name, entry in manifest["files"].items():
        print(f"{arguments.output / name}: {entry.get('rows', 0)} images, {entry['bytes']} bytes")
    print(f"{sum(entry['bytes'] for entry in manifest['files'].values())} bytes in all")
