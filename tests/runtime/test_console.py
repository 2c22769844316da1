"""What a person sees of a stage: time left over all stages, and colours on a terminal only."""

from __future__ import annotations

import io
import re
import time

import pytest
import ray

from pukd_ray.runtime import console
from pukd_ray.runtime.colour import RED, coloured
from pukd_ray.runtime.console import at_stage, doing, progress, remote_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_is_of_the_bar_and_of_the_stages_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert doing() is None
    with at_stage("score", 500.0, 60.0), progress("score", 1000, "images", 200) as bar:
        clock[0] += 30
        assert doing() is not None
        assert doing()["seconds_left"] == 470  # type: ignore[index]  # nothing is done: by the estimate
        bar.update(300)
        assert doing() == {
            "stage": "score", "seconds": 30.0, "part": "score", "done": 500.0, "total": 1000.0, "unit": "images",
            "seconds_left": 50.0, "seconds_left_in_all": 110.0,
        }  # fmt: skip
        assert bar.format_dict["in_all"] == ", 110 s in all"
    assert doing() is None


def test_a_bar_that_does_not_know_its_total_yet_is_told() -> None:
    with at_stage("distill", None, None), progress("distill", None, "steps") as bar:
        told = doing()
        assert told is not None
        assert (told["part"], told["done"], told["total"], told["seconds_left"]) == ("distill", 0.0, None, None)
        bar.total = 10
        bar.update(5)
        assert doing()["total"] == 10.0  # type: ignore[index]


def test_a_bar_of_a_part_says_nothing_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with at_stage("selector", 40.0, 60.0), progress("features", 10, "images") as bar:
        clock[0] += 10
        bar.update(9)
        assert doing()["seconds_left_in_all"] == 90.0  # type: ignore[index]
    with at_stage("selector", None, None), progress("features", 10, "images") as bar:
        bar.update(9)
        assert doing()["seconds_left_in_all"] is None  # type: ignore[index]
        assert bar.format_dict["in_all"] == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_of_a_log_has_the_time_of_all(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with at_stage("score", 500.0, 60.0), progress("score", 10, "images") as bar:
        bar.delay, bar.mininterval = 0, 0
        time.sleep(0.01)
        bar.update(5)
        bar.refresh()
    assert " left, 60 s in all\n" in out.getvalue() or (terminal and "], 60 s in all" in out.getvalue())


def test_a_log_has_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    with progress("selector", 9, "folds") as bar:
        bar.delay, bar.mininterval = 0, 0
        for _ in range(2):
            time.sleep(0.01)
            bar.update(1)
            bar.refresh()
            console.say("a line of another")
    lines = out.getvalue().split("\n")
    assert "\r" not in out.getvalue()
    assert lines.count("a line of another") == 2
    assert lines.pop() == ""
    assert all(line == "a line of another" or re.match(r"selector +\d/9 folds  .* left$", line) for line in lines)


def test_a_slow_rate_is_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stdout", stream)
        with progress("selector", 9, "folds") as bar:
            bar.n, bar.start_t = 2, bar.start_t - 10
            assert " s/fold" in str(bar)
            assert "s/ folds" not in str(bar)
            bar.n = 9000
            assert " folds/s" in str(bar)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    log, terminal = io.StringIO(), Terminal()
    assert coloured("          warning: x", log) == "          warning: x"
    assert coloured("          warning: x", terminal) == "\x1b[33m          warning: x\x1b[0m"
    assert coloured("failed: x", terminal, RED) == "\x1b[31mfailed: x\x1b[0m"
    assert coloured("no warning", terminal) == "no warning"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("failed: x", terminal, RED) == "failed: x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("failed: x", terminal, RED) == "failed: x"


def test_what_is_said_of_a_warning_is_yellow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", out := Terminal())
    console.say("warning: x")
    assert "\x1b[33mwarning: x\x1b[0m" in out.getvalue()


@pytest.mark.usefixtures("ray_cluster")
def test_the_loss_of_a_training_of_less_than_a_second_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(console, "record", lambda name, value, **labels: seen.append((name, value, labels)))
    with remote_progress("head") as counter:
        ray.get(counter.set.remote(5, 5, "selector", 0.25))
    losses = [figure for figure in seen if figure[0] == "loss"]
    assert losses[:1] == [("loss", 0.25, {"network": "selector"})]
    assert losses == losses[:1] * len(losses)  # on a slow machine it is asked for more than once
