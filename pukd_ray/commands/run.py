"""The whole pipeline: select from the corpus, distil the student, report. Without arguments: the bundled demo."""

import argparse
from collections.abc import Sequence

from pukd_ray.cli import add_redo, parse_arguments
from pukd_ray.config import ConfigError
from pukd_ray.preflight import load_config
from pukd_ray.run.stages import stages_from


def main(argv: Sequence[str]) -> None:
    """Parse, check, run, summarise."""
    arguments = parse_arguments(argv, __doc__, prog="pukd run", demo=True, add_flags=_add_flags)
    config = load_config(arguments.config, arguments.overrides)
    redo = arguments.flags.redo
    if redo and not (stage := stages_from(redo)[0]).is_asked(config):
        raise ConfigError([f"--redo {redo}: the config has no `{stage.asked_by}`"])
    # After the checks: a bad config should not wait for Ray.
    from pukd_ray.pipeline import open_folder, run_pipeline
    from pukd_ray.report.summary import summary_lines

    folder = open_folder(config)
    if arguments.flags.dry_run:
        from pukd_ray.outline import outline_run

        print("\n".join(outline_run(folder, config, redo)))
        return
    print(folder.display, flush=True)
    run_pipeline(config, redo=redo)
    print("\n".join(summary_lines(folder)))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_redo(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (stages, inputs, counts, resources, cost), and end"
    )
