"""Command lines and exit codes: what the commands share, and the table of commands."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from pukd_ray import load_config, run_pipeline
from pukd_ray.cli import DEMO_CONFIG, add_redo, at_least, parse_arguments, run_job
from pukd_ray.commands import COMMANDS, Command, main, paper_table
from pukd_ray.config import ConfigError
from pukd_ray.errors import RunError

ROOT = Path(__file__).parents[1]


def test_a_full_command_line() -> None:
    line = "--config a.yaml --selector.prior 0.2 --name=x=y --redo score --resources.score_actors [1,4] --seed -1"
    arguments = parse_arguments(line.split(), "A job.", add_flags=add_redo)
    assert arguments.config == Path("a.yaml")
    assert arguments.flags.redo == "score"
    assert arguments.overrides == {
        "selector.prior": 0.2,
        "name": "x=y",
        "resources.score_actors": [1, 4],
        "seed": -1,
    }


def test_the_demo_needs_no_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = parse_arguments([], "A job.", demo=True, add_flags=add_redo)
    assert (arguments.config, arguments.overrides, arguments.flags.redo) == (DEMO_CONFIG, {}, None)
    assert DEMO_CONFIG.is_file()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = parse_arguments([], "A job.", demo=True)
    assert arguments.overrides == {"output": f"{tmp_path}/pukd_ray/runs/demo"}
    assert parse_arguments(["--output", "/x"], "A job.", demo=True).overrides == {"output": "/x"}
    assert parse_arguments(["--config", "a.yaml"], "A job.", demo=True).overrides == {}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("", "arguments: the following arguments are required: --config"),
        ("--config", "arguments: argument --config: expected one argument"),
        ("--config a --selector.prior", "arguments: --selector.prior needs a value"),
        ("--config a --selector.prior --seed 3", "arguments: --selector.prior needs a value"),
        ("--config a --selector.prior --redo score", "arguments: --selector.prior needs a value"),
        ("--config a stray", "arguments: unexpected 'stray'"),
        ("--config a --seed 3 4", "arguments: unexpected '4'"),
        ("--config a -s 3", "arguments: unexpected '-s'"),
        ("--config a --=3", "arguments: unexpected '--=3'"),
        ("--config a --redo", "arguments: argument --redo: expected one argument"),
        ("--config a --redo training", "arguments: argument --redo: invalid choice: 'training'"),
        ("--confg a", "arguments: the following arguments are required: --config"),
        ("--config a --rdo score", "arguments: --rdo is unknown; did you mean --redo?"),
        ("--config a --redoo", "arguments: --redoo is unknown; did you mean --redo?"),
    ],
)
def test_arguments_that_are_faults(line: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split(), "A job.", add_flags=add_redo)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(fault)


@pytest.mark.parametrize(
    "line", ["f.json --config a --seed 3", "--config a f.json --seed=3", "--config a --seed 3 f.json"]
)
def test_an_operand_stands_anywhere(line: str) -> None:
    arguments = parse_arguments(line.split(), "A job.", operand="FILE")
    assert (arguments.config, arguments.operand, arguments.overrides) == (Path("a"), "f.json", {"seed": 3})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("--config a", "arguments: the following arguments are required: FILE"),
        ("--config a --seed 3", "arguments: the following arguments are required: FILE"),
        ("--config a one two", "arguments: unexpected 'two'"),
    ],
)
def test_an_operand_must_be_there_once(line: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split(), "A job.", operand="FILE")
    assert caught.value.faults == [fault]


def test_redo_is_no_key_where_a_job_has_none() -> None:
    assert parse_arguments(["--config", "a", "--redo", "score"], "A job.").overrides == {"redo": "score"}


def test_a_flag_that_is_nearly_one_is_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    for line, meant in (("--dryrun", "--dry-run"), ("--confg x", "--config")):
        assert main(["run", *line.split()]) == 2
        assert capsys.readouterr().err == f"arguments: {line.split()[0]} is unknown; did you mean {meant}?\n"
    assert parse_arguments(["--config", "a", "--seed", "3"], None, add_flags=paper_table.add_flags).overrides == {
        "seed": 3  # not --seeds
    }


def test_redo_of_a_stage_that_the_config_does_not_ask_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--redo", "export", "--dry-run"]) == 2
    assert capsys.readouterr().err == "--redo export: the config has no `export`\n"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("estimate --cpu-hour -1", "--cpu-hour: -1 should be a number, at least 0"),
        ("estimate --gpu-hour nan", "--gpu-hour: nan should be a number, at least 0"),
        ("estimate --gib-month inf", "--gib-month: inf should be a number, at least 0"),
        ("soak --minutes -1", "--minutes: -1 should be a number, at least 0"),
        ("soak --faults 0", "--faults: 0 should be a whole number, at least 1"),
        ("measure-decoding --images 0", "--images: 0 should be a whole number, at least 1"),
        ("measure-decoding --rounds 1.5", "--rounds: 1.5 should be a whole number, at least 1"),
        ("measure-near --images x --size 0", "--size: 0 should be a whole number, at least 8"),
        ("measure-near --images x --copied 0", "--copied: 0 should be a whole number, at least 1"),
        ("measure-near --images x --rows -1", "--rows: -1 should be a whole number, at least 0"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(line: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"arguments: argument {fault}\n"


def test_amounts_are_numbers() -> None:
    assert [at_least(0, float)("0.5"), at_least(1)("3")] == [0.5, 3]


@pytest.mark.parametrize("command", ["make-pools", "make-demo-data", "selector-study", "coverage-study"])
def test_data_that_are_not_there_are_a_fault_of_the_arguments(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nope", tmp_path):
        assert main([command, "--source", str(folder), "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"arguments: --source {folder}: train-images-idx3-ubyte.gz is not there: install ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nope", "notes.txt", "x.parquet", "folder"])
def test_images_that_cannot_be_read_measure_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    pq.write_table(pa.table({"jpeg": [b"x"]}), tmp_path / "x.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").write_text("no image")
    assert main(["measure-near", "--images", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"arguments: --images {tmp_path}/{name}: no image can be read there: ")


def test_help_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"], "What the job does.")
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "What the job does." in said
    assert "relative to the config's folder" in said
    assert "pukd_ray/config.py has all keys" in said


def failing(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ConfigError(["selector.prior: x", "seed: y"]), 2, "selector.prior: x\nseed: y"),
        (RunError("nothing is relevant"), 1, "failed: nothing is relevant"),
        (
            RayTaskError(
                "read", "Traceback\n  and\nmore", RunError("no storage\nFailed to apply UDF"), "read", 1, "::1"
            ).as_instanceof_cause(),
            1,
            "failed: no storage",
        ),
        (KeyboardInterrupt(), 1, "failed: interrupted; start again to go on where it stopped"),
    ],
)
def test_expected_ends_have_no_traceback(
    error: BaseException, code: int, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(failing(error)) == code
    assert capsys.readouterr().err == f"{last}\n"


def test_an_unexpected_end_has_a_traceback_and_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(failing(OSError("disk full"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "failed: OSError: disk full; mend the cause and start again to go on"


def test_a_job_that_is_done_exits_with_0() -> None:
    done: list[int] = []
    assert run_job(lambda: done.append(1)) == 0
    assert done == [1]


def imported(code: str) -> tuple[int, set[str]]:
    """Exit code of `code` in a process of its own, and which of the slow packages it imported."""
    report = "import atexit, sys; atexit.register(lambda: print('\\n', *{'ray', 'torch'} & sys.modules.keys()))\n"
    done = subprocess.run([sys.executable, "-c", report + code], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [[], ["--help"], *([c.name, "--help"] for c in COMMANDS)])
def test_help_waits_for_nothing(arguments: list[str]) -> None:
    assert imported(f"import sys; from pukd_ray.commands import main; sys.exit(main({arguments}))") == (0, set())


def test_a_bad_config_does_not_wait_for_ray(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("selector: {prior: 2}")
    code = "import sys; from pukd_ray.commands import main; sys.exit(main(['run', '--config', sys.argv[1]]))"
    code = code.replace("sys.argv[1]", repr(str(tmp_path / "bad.yaml")))
    assert imported(code) == (2, set())
    # The demo's own files are sound, so only the weights are read: torch, still no Ray.
    code = code.replace(repr(str(tmp_path / "bad.yaml")), repr(str(DEMO_CONFIG))).replace("]))", ", '--seed', '-1']))")
    assert imported(code) == (2, {"torch"})


def test_the_loader_is_public_and_quick() -> None:
    assert imported("from pukd_ray import ConfigError, RunConfig, RunError, load_config") == (0, set())
    assert imported("import ray, torch") == (0, {"ray", "torch"})


def test_no_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown and command.help in " ".join(shown.split()) for command in COMMANDS)


def test_an_unknown_command_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu", "--config", "a.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("arguments: argument COMMAND: invalid choice: 'rnu'")
    assert all(command.name in line for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_says_what_it_is(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command.name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: pukd {command.name} ")
    assert main([command.name, "--nonsense"]) == 2
    assert capsys.readouterr().err.startswith("arguments: ")


def test_each_job_is_a_command_and_each_command_that_computes_a_job() -> None:
    jobs = {path.read_text().partition('main(["')[2].partition('"')[0] for path in (ROOT / "jobs").glob("*.py")}
    assert jobs == {command.name for command in COMMANDS if command.job}
    assert [command.name for command in COMMANDS if not command.job] == ["status", "show", "publish"]


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pukd_ray"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: pukd ")


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_that_cannot_be_made_is_a_fault_of_the_config(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    config = load_config(DEMO_CONFIG, {"output": f"{tmp_path}/file{below}"})
    with pytest.raises(ConfigError, match=rf"^output: {tmp_path}/file{below} cannot be made \(.*\): name a folder"):
        run_pipeline(config)
