"""Train a teacher on labelled images and write its weights, for those who have none yet."""

import sys

from pukd_ray.cli import parse_arguments, run_job
from pukd_ray.preflight import load_teacher_training


def main() -> None:
    """Parse, check, train, report."""
    arguments = parse_arguments(sys.argv[1:], __doc__)
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


if __name__ == "__main__":
    sys.exit(run_job(main))
