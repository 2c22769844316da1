"""Train a teacher on labelled images and write its weights, for those who have none yet."""

from collections.abc import Sequence

from pukd_ray.cli import parse_arguments
from pukd_ray.preflight import load_teacher_training


def main(argv: Sequence[str]) -> None:
    """Parse, check, train, report."""
    arguments = parse_arguments(argv, __doc__, prog="pukd train-teacher")
    config = load_teacher_training(arguments.config, arguments.overrides)
    # After the checks: a bad config should not wait for torch and Ray.
    from pukd_ray.distillation.supervised import train_teacher
    from pukd_ray.runtime.engine import engine

    with engine("teacher") as cluster:
        report = train_teacher(config, cluster)
    print(f"{report['images']:,} images, {report['steps']:,} steps")
    if "top1" in report:
        print(f"top-1 on {report['test_images']:,} test images: {report['top1']:.4f}")
    print(config.teacher.weights)
