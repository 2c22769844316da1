"""The whole pipeline: select from the corpus, distil the student, report. Without arguments: the bundled demo."""

from collections.abc import Sequence

from pukd_ray.cli import add_redo, parse_arguments
from pukd_ray.preflight import load_config


def main(argv: Sequence[str]) -> None:
    """Parse, check, run, summarise."""
    arguments = parse_arguments(argv, __doc__, prog="pukd run", demo=True, add_flags=add_redo)
    config = load_config(arguments.config, arguments.overrides)
    # After the checks: a bad config should not wait for Ray.
    from pukd_ray.pipeline import open_folder, run_pipeline
    from pukd_ray.report.summary import summary_lines

    folder = open_folder(config)
    print(folder.display, flush=True)
    run_pipeline(config, redo=arguments.flags.redo)
    print("\n".join(summary_lines(folder)))
