"""Write the pools that the studies measure on (hard, easy, rare, imbalanced) as Parquet files, each with P and truth.

Fashion-MNIST is read from Debian's package: `apt-get install dataset-fashion-mnist`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from pukd_ray.demo.pools import POOLS, draw_pool, load_bank, write_pool


def main() -> None:
    """Parse the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("data/pools"), help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--tuning", action="store_true", help="the pools that choices are made on")
    arguments = parser.parse_args()

    if not arguments.source.is_dir():
        sys.exit(f"{arguments.source} is missing: install dataset-fashion-mnist or name its folder with --source")
    bank = load_bank(arguments.source, os.cpu_count() or 1)
    facts = {}
    for name in POOLS:
        pool = draw_pool(bank, name, seed=arguments.seed, tuning=arguments.tuning)
        facts[name] = write_pool(bank, pool, arguments.output / name)
        print(f"{arguments.output / name}: {facts[name]['images']:,} images, {facts[name]['relevant']:,} relevant")
    (arguments.output / "pools.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
