"""The command line `pukd`: a table of commands. One entry adds a command.

Nothing here imports torch or Ray before a command needs them: help and a bad config answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from pukd_ray import __version__
from pukd_ray.cli import Parser, run_job


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    help: str
    runs: str
    """`module:function`; it is given the arguments after the command's name. Imported when it runs."""
    job: bool = True
    """Whether `jobs/` has an entry point of the same name for `ray job submit`: not of what a person looks at."""

    def function(self) -> Callable[[Sequence[str]], None]:
        """What runs it."""
        module, _, name = self.runs.partition(":")
        found: Callable[[Sequence[str]], None] = getattr(import_module(module), name)
        return found


COMMANDS = (
    Command("run", "select from the corpus, distil the student, report", "pukd_ray.commands.run:main"),
    Command("estimate", "what a run will take: time, hours of CPUs and GPUs, money", "pukd_ray.commands.estimate:main"),
    Command("status", "how far a run is, from its folder alone", "pukd_ray.commands.status:main", job=False),
    Command("show", "rows and pictures of single images", "pukd_ray.commands.show:main", job=False),
    Command("publish", "the selection and the student for Hugging Face", "pukd_ray.commands.publish:main", job=False),
    Command("audit", "know what the run is worth: label some images by hand", "pukd_ray.commands.audit:main"),
    Command("train-teacher", "train a teacher on labelled images", "pukd_ray.commands.train_teacher:main"),
    Command("paper-table", "the paper's table for any data set", "pukd_ray.commands.paper_table:main"),
    Command("selector-study", "measure the selector where truth is known", "pukd_ray.commands.selector_study:main"),
    Command("coverage-study", "measure how often the intervals hold", "pukd_ray.commands.coverage_study:main"),
    Command("make-pools", "write the pools that the studies measure on", "pukd_ray.commands.make_pools:main"),
    Command("make-demo-data", "make the bundled demo data anew", "pukd_ray.commands.make_demo_data:main"),
    Command("measure-near", "how well near-copies are found", "pukd_ray.commands.measure_near:main"),
    Command("measure-decoding", "the CPUs that a GPU needs beside it", "pukd_ray.commands.measure_decoding:main"),
    Command("soak", "disturb small runs on purpose; nothing may be lost", "pukd_ray.commands.soak:main"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """`pukd COMMAND ...`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_job(lambda: _run_command(argv))


def _run_command(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="pukd",
        description="Compress an image classifier with few labelled images and a huge unlabelled corpus.",
        epilog="`pukd COMMAND --help` says more; `pukd run` alone runs the bundled demo.",
    )
    parser.add_argument("--version", action="version", version=f"pukd_ray {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        commands.add_parser(command.name, help=command.help, add_help=False)
    chosen = parser.parse_args(argv[:1]).command  # the rest is the command's own
    if chosen is None:
        parser.print_help()
        return
    next(command for command in COMMANDS if command.name == chosen).function()(argv[1:])
