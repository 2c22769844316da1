"""What the commands share: their arguments, their exit codes, their last lines."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from pukd_ray.config import ConfigError, RunConfig, TeacherTrainingConfig
from pukd_ray.errors import RunError
from pukd_ray.preflight import parse_value
from pukd_ray.run.stages import STAGE_NAMES
from pukd_ray.runtime.colour import RED, YELLOW, coloured
from pukd_ray.runtime.environment import under_job
from pukd_ray.storage import redact

DEMO_CONFIG = Path(str(files("pukd_ray.demo") / "demo.yaml"))


@dataclass(frozen=True)
class Arguments:
    """The command line of a command that takes a config."""

    config: Path
    overrides: dict[str, Any]
    flags: argparse.Namespace
    """`redo`, and whatever the command adds."""
    operand: str = ""
    """What the command is about, if it takes that."""


class Parser(argparse.ArgumentParser):
    """Whose errors are ConfigErrors, one line each."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ConfigError([f"arguments: {message}"])


def parse_arguments(
    argv: Sequence[str],
    description: str | None,
    *,
    prog: str | None = None,
    demo: bool = False,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    operand: str | None = None,
) -> Arguments:
    """`[--config FILE] [--key.sub VALUE ...]` and what `add_flags` adds; ConfigError for anything else.

    `operand` names one more argument without a flag, which must be there.
    """
    parser = Parser(
        prog=prog,
        description=description,
        epilog="Any config key can be set as --key.sub VALUE, for example --selector.prior 0.2. Paths of inputs are "
        "relative to the config's folder, in the file and here alike; `output` is to the working directory. "
        "pukd_ray/config.py has all keys, with their defaults and meaning.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, required=not demo, help="YAML file" + (" (default: the bundled demo)" if demo else "")
    )
    if add_flags:
        add_flags(parser)
    if operand:  # argparse would take the value of the first --key for it
        parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} {operand}"
    known, rest = parser.parse_known_args(argv)
    overrides: dict[str, Any] = {}
    operands: list[str] = []
    while rest:
        flag = rest.pop(0)
        if operand and not operands and not flag.startswith("-"):
            operands.append(flag)
            continue
        if not re.match(r"--\w", flag):
            raise ConfigError([f"arguments: unexpected {flag!r}"])
        key, equals, value = flag[2:].partition("=")
        if meant := _flag_like(parser, key):
            raise ConfigError([f"arguments: --{key} is unknown; did you mean {meant}?"])
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError([f"arguments: --{key} needs a value"])
            value = rest.pop(0)
        overrides[key] = parse_value(value)
    if operand and not operands:
        raise ConfigError([f"arguments: the following arguments are required: {operand}"])
    if known.config is None and "output" not in overrides and under_job():
        # The demo under a job: its working directory vanishes with the job.
        overrides["output"] = str(Path.home() / "pukd_ray" / "runs" / "demo")
    return Arguments(known.config or DEMO_CONFIG, overrides, known, "".join(operands))


def _flag_like(parser: argparse.ArgumentParser, key: str) -> str | None:
    """The flag that `key`, which is the name of no config key, is nearly."""
    if key in RunConfig.__dataclass_fields__ or key in TeacherTrainingConfig.__dataclass_fields__:
        return None
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return next(iter(difflib.get_close_matches(f"--{key}", flags, n=1, cutoff=0.8)), None)


def parse_flags(
    argv: Sequence[str], description: str | None, prog: str, add_flags: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """The command line of a command that takes no config; ConfigError for what `add_flags` does not know."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    return parser.parse_args(argv)


def at_least(least: int, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """For `type` of an argument: a finite number from `least` on."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} should be {what}, at least {least}")
        return value

    return parse


def add_redo(parser: argparse.ArgumentParser) -> None:
    """`--redo STAGE`."""
    parser.add_argument(
        "--redo", choices=STAGE_NAMES, help="do this stage and all after it again; old results move to old/"
    )


def run_job(main: Callable[[], None]) -> int:
    """Run a command's body and return its exit code: 0 done, 2 bad config or arguments, 1 the run failed."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Coloured("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        main()
    except ConfigError as error:
        for fault in error.faults:
            _tell(fault)
        return 2
    except RunError as error:
        _tell(f"failed: {_cause(error)}")
        return 1
    except KeyboardInterrupt:
        _tell("failed: interrupted; start again to go on where it stopped")
        return 1
    except Exception as error:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        _tell(f"failed: {_cause(error)}; mend the cause and start again to go on")
        return 1
    return 0


def _tell(fault: str) -> None:
    """One line on stderr, at once; red on a terminal."""
    print(coloured(redact(fault), sys.stderr, RED), file=sys.stderr, flush=True)


class _Coloured(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        colour = RED if record.levelno >= logging.ERROR else YELLOW if record.levelno >= logging.WARNING else None
        return coloured(super().format(record), sys.stderr, colour)


def _cause(error: Exception) -> str:
    from pukd_ray.runtime.engine import cause_of

    return cause_of(error)
