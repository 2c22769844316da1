"""The whole pipeline: select from the corpus, distil the student, report. Without arguments: the bundled demo."""

import sys

from pukd_ray import load_config, run_pipeline
from pukd_ray.cli import add_redo, parse_arguments, run_job
from pukd_ray.pipeline import open_folder
from pukd_ray.report.summary import summary_lines


def main() -> None:
    """Parse, check, run, summarise."""
    arguments = parse_arguments(sys.argv[1:], __doc__, demo=True, add_flags=add_redo)
    config = load_config(arguments.config, arguments.overrides)
    folder = open_folder(config)
    print(folder.display, flush=True)
    run_pipeline(config, redo=arguments.flags.redo)
    print("\n".join(summary_lines(folder)))


if __name__ == "__main__":
    sys.exit(run_job(main))
