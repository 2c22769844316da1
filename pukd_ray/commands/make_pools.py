"""Write the pools that the studies measure on (hard, easy, rare, imbalanced) as Parquet files, each with P and truth.

Fashion-MNIST is read from Debian's package: `apt-get install dataset-fashion-mnist`. With `--data` instead corpora of
real images, with 0.5 to 50 % relevant ones: of Tiny ImageNet, for CIFAR-10's task (docs/results.md says which files).
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from pukd_ray.cli import parse_flags
from pukd_ray.config import ConfigError
from pukd_ray.demo.pools import POOLS, Bank, Pool, draw_pool, load_bank, write_pool
from pukd_ray.studies.cifar import SHARES, draw_share, load_cifar


def add_source(parser: argparse.ArgumentParser) -> None:
    """`--source FOLDER`, of Fashion-MNIST."""
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="[%(default)s]")


def check_source(folder: Path, *parts: str) -> None:
    """ConfigError unless both files of each part are there."""
    files = [f"{part}-{kind}-ubyte.gz" for part in parts for kind in ("images-idx3", "labels-idx1")]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ConfigError(
            [
                f"arguments: --source {folder}: {missing[0]} is not there: install dataset-fashion-mnist, or name the "
                "folder of its four files"
            ]
        )


def load_source(folder: Path) -> Bank:
    """All images there; ConfigError if there are none."""
    check_source(folder, "train")
    return load_bank(folder, os.cpu_count() or 1)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    add_source(parser)
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and tiny_imagenet32/: corpora of these instead")
    parser.add_argument("--output", type=Path, default=Path("data/pools"), help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--tuning", action="store_true", help="the pools that choices are made on")


def main(argv: Sequence[str]) -> None:
    """Parse the arguments and write the files."""
    arguments = parse_flags(argv, __doc__, "pukd make-pools", add_flags)
    pools: dict[str, Pool]
    file = arguments.output / "pools.json"
    if arguments.data is not None:
        file = arguments.output / "cifar.json"
        bank = load_cifar(arguments.data)
        pools = {f"cifar-{share:g}": draw_share(bank, share, seed=arguments.seed) for share in SHARES}
    else:
        bank = load_source(arguments.source)
        pools = {name: draw_pool(bank, name, seed=arguments.seed, tuning=arguments.tuning) for name in POOLS}
    facts = {}
    for name, pool in pools.items():
        facts[name] = write_pool(bank, pool, arguments.output / name)
        print(f"{arguments.output / name}: {facts[name]['images']:,} images, {facts[name]['relevant']:,} relevant")
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
