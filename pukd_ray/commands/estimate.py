"""What a run will take: time, CPU and GPU hours, storage, money. Without arguments: of the bundled demo."""

import argparse
from collections.abc import Sequence

from pukd_ray.cli import at_least, parse_arguments
from pukd_ray.preflight import load_config

TRIAL_IMAGES = 2000


def main(argv: Sequence[str]) -> None:
    """Parse, check, try, print."""
    arguments = parse_arguments(argv, __doc__, prog="pukd estimate", demo=True, add_flags=_add_flags)
    config = load_config(arguments.config, arguments.overrides)
    # After the checks: a bad config should not wait for Ray.
    from pukd_ray.estimate import Prices, estimate_run, lines_of
    from pukd_ray.pipeline import open_folder

    open_folder(config)
    flags = arguments.flags
    found = estimate_run(config, Prices(flags.cpu_hour, flags.gpu_hour, flags.gib_month), flags.images)
    print("\n".join(lines_of(found)))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=int, default=TRIAL_IMAGES, help="of the corpus, in the largest of three trials (%(default)s)"
    )
    for name, what in (("cpu", "a CPU's hour"), ("gpu", "a GPU's hour")):
        parser.add_argument(
            f"--{name}-hour", type=at_least(0, float), default=0.0, help=f"price of {what}, in any currency"
        )
    parser.add_argument("--gib-month", type=at_least(0, float), default=0.0, help="price of storing a GiB for a month")
