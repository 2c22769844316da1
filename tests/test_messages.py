"""docs/messages.md has every error of the package; one without a trigger in triggers.py is found here.

`PUKD_WRITE=1 pytest tests/test_messages.py` writes the page anew.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import ray
from ray.remote_function import RemoteFunction
from triggers import ALARMS, ELSEWHERE, TRIGGERS, Home

import pukd_ray
from pukd_ray import ConfigError, load_config
from pukd_ray.cli import DEMO_CONFIG

ROOT = Path(__file__).parents[1]
PACKAGE = Path(pukd_ray.__file__).parent
PAGE = ROOT / "docs" / "messages.md"
INTRODUCTION = """# Messages

Every error that ends a run, word for word, as `tests/triggers.py` makes it happen. The page is written by
`PUKD_WRITE=1 pytest tests/test_messages.py`, which fails where the package raises an error that is not on it. The
number is the exit status: 2 for what is wrong with the config or the arguments, before Ray starts where that can be
told; 1, after `failed: `, for the rest. What is wrong with a single image is a row of the scores and no error: see
[reliability.md](reliability.md).
"""

OURS = {"ConfigError", "RunError", "PlaceError", "MissingError", "LabelError", "RuntimeError", "FileNotFoundError"}
HELPERS = {"_stale_results"}
"""Functions that make one."""
OF_CONFIG = {"config.py", "studies/config.py", "networks/zoo.py", "storage.py"}
"""Where a ValueError becomes the fault of a config; those of other functions are for whoever calls them wrongly."""


Seen = tuple[dict[str, list[str]], set[tuple[str, int]]]


@dataclass(frozen=True)
class Site:
    """A `raise`."""

    module: str
    first: int
    last: int
    code: str


@cache
def sites() -> tuple[Site, ...]:
    """All in the package that must be on the page."""
    return tuple(_sites())


def _sites() -> Iterator[Site]:
    for file in sorted(PACKAGE.rglob("*.py")):
        module = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and told_by(node.exc, module):
                yield Site(module, node.lineno, node.end_lineno or node.lineno, ast.unparse(node.exc))


def told_by(call: ast.Call, module: str) -> bool:
    """Whether the call makes an error of ours, in words of its own."""
    kind = ast.unparse(call.func)
    if kind in HELPERS:
        return True
    if kind not in OURS and not (kind == "ValueError" and module in OF_CONFIG):
        return False
    passed_on = all(isinstance(a, ast.Name) or ast.unparse(a).startswith("str(") for a in call.args)
    return kind == "ConfigError" or not passed_on


@contextmanager
def raised(into: set[tuple[str, int]]) -> Iterator[None]:
    """Notes (file, line) of what is raised in the package, even if it is caught there."""

    def look(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        frame.f_trace_lines = False
        if event == "exception" and argument[2].tb_next is None:
            into.add((frame.f_code.co_filename, frame.f_lineno))
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Tasks run where they are asked for: what is said does not depend on where."""

    def call(task: RemoteFunction, args: Any, kwargs: Any, **_: Any) -> Any:
        return task._function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFunction, "_remote", call)
        patch.setattr(ray, "get", lambda results: results)
        yield


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """(lines of the page by heading, where errors were raised)."""
    page: dict[str, list[str]] = {}
    places: set[tuple[str, int]] = set()
    config = load_config(DEMO_CONFIG)
    for heading, triggers in TRIGGERS.items():
        lines: list[str] = []
        for trigger in triggers:
            path = tmp_path_factory.mktemp("home")
            home = Home(path, replace(config, output=str(path / "run")))
            with pytest.raises(Exception) as caught, in_this_process(), raised(places):  # noqa: PT011
                trigger(home)
            error = caught.value
            told = error.faults if isinstance(error, ConfigError) else [str(error)]
            assert all("\n" not in line for line in told), told
            lines += [f"{2 if isinstance(error, ConfigError) else 1}  {anywhere(line, path)}" for line in told]
        page[heading] = list(dict.fromkeys(lines))
    return page, places


def anywhere(line: str, home: Path) -> str:
    """`line` as it would be on another machine, at another time."""
    line = line.replace(str(home), "/home").replace(str(DEMO_CONFIG.parent), "/demo")
    line = re.sub(r"process \d+ on [\w.-]+", "process 4711 on host", line)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "2026-01-01T12:00:00+00:00", line)


def listed(site: Site, parts: Any) -> str | None:
    """The part of `parts` that the site's words have; quotes and line breaks of the code do not matter."""
    words = re.sub(r"\s+", " ", site.code)
    return next((part for part in parts if part in words), None)


def test_every_error_has_a_trigger(seen: Seen) -> None:
    _, places = seen
    hit = [s for s in sites() if any(f == str(PACKAGE / s.module) and s.first <= n <= s.last for f, n in places)]
    missing = [s for s in sites() if s not in hit and not listed(s, (*ELSEWHERE, *ALARMS))]
    assert not missing, "errors without a trigger in tests/triggers.py:\n" + "\n".join(
        f"pukd_ray/{s.module}:{s.first}: {s.code}" for s in missing
    )
    assert not [s for s in hit if listed(s, (*ELSEWHERE, *ALARMS))]


def test_what_is_seen_elsewhere_is() -> None:
    all_sites = sites()
    for part in (*ELSEWHERE, *ALARMS):
        assert sum(listed(site, [part]) is not None for site in all_sites) == 1, part
    for test in ELSEWHERE.values():
        assert (ROOT / test).exists()


def test_the_page_is_what_the_triggers_say(seen: Seen) -> None:
    page, _ = seen
    parts = [INTRODUCTION]
    parts += [f"## {heading}\n\n```text\n{chr(10).join(lines)}\n```\n" for heading, lines in page.items()]
    for heading, chosen in (("What takes a run to see", ELSEWHERE), ("Alarms: the program itself is at fault", ALARMS)):
        lines = [words(site) for part in chosen for site in sites() if listed(site, [part])]
        parts.append(f"## {heading}\n\n```text\n{chr(10).join(lines)}\n```\n")
    text = "\n".join(parts)
    if os.environ.get("PUKD_WRITE"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def words(site: Site) -> str:
    """The message as the code has it."""
    call = ast.parse(site.code, mode="eval").body
    assert isinstance(call, ast.Call)
    message = next(n for n in ast.walk(call) if isinstance(n, ast.JoinedStr | ast.Constant))
    values = message.values if isinstance(message, ast.JoinedStr) else [message]
    return f"{2 if ast.unparse(call.func) == 'ConfigError' else 1}  " + "".join(
        str(v.value) if isinstance(v, ast.Constant) else "{...}" for v in values
    )
