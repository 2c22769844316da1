"""What a user hears of a config before anything starts: all faults in one go, one line each, the key first."""

import argparse
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import fsspec
import pytest
import torch
import yaml
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from synthetic import write_config, write_task

from pukd_ray import RunError, load_config
from pukd_ray.cli import run_job
from pukd_ray.config import OPTIONS, ConfigError, Listed, RunConfig, SourceConfig
from pukd_ray.networks.teacher import dump_safetensors
from pukd_ray.networks.zoo import build_network
from pukd_ray.preflight import load_teacher_training, parse_value, to_yaml
from pukd_ray.preflight.faults import validate
from pukd_ray.preflight.files import output_faults
from pukd_ray.storage import redact

SHAPE = {"num_classes": 5, "channels": 1, "input_size": 28}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return build_network("lenet5", **SHAPE).state_dict()


@pytest.fixture
def home(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A folder with a sound config and all that it names."""
    (tmp_path / "data").mkdir()
    for name in ("p.parquet", "u.parquet", "t.parquet"):
        (tmp_path / "data" / name).write_bytes(b"x")
    torch.save(weights, tmp_path / "teacher.pt")
    (tmp_path / "classes.txt").write_text("shirt\n\n  coat \nbag\nno\n1e-3\n")
    write(tmp_path)
    return tmp_path


def write(home: Path, **more: Any) -> None:
    raw = {
        "teacher": {"arch": "lenet5", "weights": "teacher.pt", "mean": [0.2], "std": [0.3], **SHAPE},
        "positives": {"uri": "data/p.parquet"},
        "corpus": {"uri": "data/*.parquet"},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(raw | more))


def load(home: Path, **overrides: Any) -> RunConfig:
    return load_config(home / "run.yaml", {k.replace("__", "."): v for k, v in overrides.items()})


def faults(home: Path, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(home / "run.yaml", overrides)
    return caught.value.faults


def test_a_sound_config(home: Path) -> None:
    config = load(home)
    assert config.teacher.weights == str(home / "teacher.pt")
    assert config.positives[0].uri == str(home / "data/p.parquet")
    assert config.corpus[0].uri == f"{home}/data/*.parquet"
    assert config.output == "runs/my-run"
    assert config.selector.prior == "auto"


def test_a_config_builds_on_another_whose_paths_are_its_own(home: Path) -> None:
    (home / "more").mkdir()
    (home / "more" / "p.parquet").write_bytes(b"x")
    (home / "between.yaml").write_text("base: run.yaml\nselector: {steps: 7, lr: 0.1}\nselection: {rule: all}\n")
    (home / "more" / "top.yaml").write_text(
        "base: ../between.yaml\nselector: {steps: 9}\npositives: {uri: p.parquet}\nteacher: {mean: [0.4]}\n"
    )
    config = load_config(home / "more" / "top.yaml", {"corpus.uri": "p.parquet", "selector.views": 2})
    assert (config.selector.steps, config.selector.lr, config.selector.views) == (9, 0.1, 2)
    assert config.selection.rule == "all"
    assert (config.teacher.mean, config.teacher.std) == ((0.4,), (0.3,))
    assert config.teacher.weights == str(home / "teacher.pt")
    assert config.positives[0].uri == config.corpus[0].uri == str(home / "more" / "p.parquet")
    (home / "run.yaml").write_text("base: more/top.yaml\n")
    with pytest.raises(ConfigError, match=r"base: .*top.yaml builds on itself"):
        load_config(home / "more" / "top.yaml")


def test_every_kind_of_fault_is_told_in_one_go(home: Path) -> None:
    other = build_network("lenet5_half", **SHAPE).state_dict()
    torch.save(other, home / "half.pt")
    write(
        home,
        selctor={"loss": "nnpu"},
        selector={"priro": 0.1, "prior": 1.5, "steps": True, "lr": "fast", "batch_size": 64},
        corpus=[{"uri": "data/u.parquet", "formt": "x"}, {"uri": "data/none.parquet", "rows": [5, 2]}],
        distill={"epochs": 1.5, "epsilon": -1, "augment": "flip"},
        selection={"rule": "budget", "order": "best"},
        student={"arch": "resnet18_cifra"},
        resources={"train_workers": 3, "score_actors": [4, 2]},
        name=7,
    )
    found = faults(home, {"teacher.weights": "half.pt", "score.keep.images": "all"})
    assert all("\n" not in fault for fault in found)
    expected = {
        "selctor": "unknown key; did you mean selector or ",
        "selector.priro": "unknown key; did you mean selector.prior?",
        "selector.prior": "1.5 should be auto or audit or below 1",
        "selector.steps": "true should be a whole number",
        "selector.lr": '"fast" should be a number',
        "corpus.0.formt": "unknown key; did you mean corpus.0.format?",
        "corpus.1.uri": f"no such file or folder: {home}/data/none.parquet",
        "corpus.1.rows": "[5, 2] is not 0 <= start < stop",
        "distill.epochs": "1.5 should be a whole number",
        "distill.epsilon": "-1 should be at least 0",
        "distill.augment": '"flip" should be crop_flip, crop or none',
        "selection.budget": "is needed by selection.rule budget",
        "selection.order": '"best" should be top or random',
        "student.arch": "resnet18_cifra: no such network; did you mean resnet18_cifar",
        "resources.score_actors": "min is above max",
        "resources.train_workers": "3 does not divide ",  # both batches, a line for each
        "name": "7 should be text",
        "score.keep.images": "unknown key",
        "teacher.weights": f"{home}/half.pt, arch lenet5: does not fit LeNet5: wrong shape: conv1.weight is "
        "[3, 1, 5, 5] instead of [6, 1, 5, 5]",
    }
    by_key = {fault.partition(": ")[0]: fault.partition(": ")[2] for fault in found}
    assert by_key.keys() == expected.keys()
    for key, text in expected.items():
        assert by_key[key].startswith(text), (key, by_key[key])
    assert len(found) == len(expected) + 1
    assert "resources.train_workers: 3 does not divide a quarter of selector.batch_size (16)" in found
    assert "resources.train_workers: 3 does not divide distill.batch_size (256)" in found


def test_required_keys(home: Path) -> None:
    (home / "run.yaml").write_text("selector: {prior: 0.2}")
    assert faults(home) == ["teacher: is required", "positives: is required", "corpus: is required"]
    (home / "run.yaml").write_text("teacher: {weights: none.pt}\npositives: {}\ncorpus: {uri: nowhere}")
    assert faults(home) == [
        *(f"teacher.{key}: is required" for key in ("arch", "num_classes", "input_size", "mean", "std")),
        "positives.uri: is required",
        f"corpus.uri: no such file or folder: {home}/nowhere",
        f"teacher.weights: no such file: {home}/none.pt",
    ]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("teacher", None, "null should be keys and values"),
        ("teacher", [1], "[1] should be keys and values"),
        ("teacher.mean", 0.1, "0.1 should be a list"),
        ("teacher.mean", [0.1, 0.2], "needs 1 value, one per channel"),
        ("teacher.mean.0", "a", '"a" should be a number'),
        ("teacher.mean.1", 0.5, "there is no such key to set; its items are numbered 0 to 0"),
        ("teacher.std", [0.0], "values must be above 0"),
        ("teacher.channels", 2, "2 should be 1 or 3"),
        ("teacher.num_classes", True, "true should be a whole number"),
        ("teacher.input_size", 4, "4 should be at least 8"),
        ("teacher.classes", ["a", "b"], "2 names, but teacher.num_classes is 5"),
        ("teacher.classes", list("abcda"), "a name is repeated"),
        ("teacher.arch", "lenet6", "lenet6: no such network; did you mean"),
        ("teacher.arch", "", "is empty"),
        ("teacher.weights", "", "is empty"),
        ("corpus", "u.parquet", '"u.parquet" should be keys and values'),
        ("corpus", [], "is an empty list"),
        ("corpus.uri", 5, "5 should be text or a list"),
        ("corpus.uri", "", "is empty"),
        ("corpus.uri", "nope://x/y", "nope://x/y cannot be reached: nope://x/y: Protocol not known: nope"),
        ("corpus.uri", "no/*.parquet", "no such folder: "),
        ("corpus.rows", [1, 2, 3], "[1, 2, 3] should be a list of 2"),
        ("corpus.relevant", 1, "1 should be true or false"),
        ("selector", 5, "5 should be keys and values"),
        ("selector.prior", 0, "0 should be auto or audit or above 0"),
        ("selector.prior", 1.0, "1.0 should be auto or audit or below 1"),
        ("selector.prior", "maybe", '"maybe" should be auto or audit or a number'),
        ("selector.batch_size", 10, "10 is not a multiple of 4 (a quarter of it is P)"),
        ("selection.target_precision", 2, "2 should be below 1"),
        ("resources.score_actors", 0, "0 should be auto or at least 1 or a list"),
        ("seed", -1, "-1 should be at least 0"),
        ("seed", 2**31, "2147483648 should be below 2147483648"),
        ("distill.lr", float("nan"), "NaN should be a finite number"),
        ("output", "", "is empty"),
        ("name", "", "is empty"),
        ("a.b.c", 1, "unknown key"),
        ("selector.prio", 0.2, "unknown key; did you mean selector.prior?"),
        ("corpus.uir", "x", "unknown key; did you mean corpus.uri?"),
        ("selecter.prior", 0.2, "unknown key; did you mean selector or selection?"),
        ("budget", 9, "unknown key; did you mean selection.budget?"),
        ("", 1, "there is no such key to set"),
        ("teacher.", 1, "there is no such key to set"),
    ],
)
def test_one_fault_is_one_line_with_its_key(home: Path, key: str, value: Any, text: str) -> None:
    (fault,) = faults(home, {key: value})
    assert fault.startswith(f"{key}: {text}")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("corpus.uri", ["data", 5], "corpus.uri.1: 5 should be text"),
        ("corpus.label_map", {"a": 1.5}, "corpus.label_map.a: 1.5 should be a whole number or text"),
        ("selection.rule", "budget", "selection.budget: is needed by selection.rule budget"),
        ("selection.rule", "threshold", "selection.threshold: is needed by selection.rule threshold"),
        ("selection.rule", "precision", "selection.target_precision: is needed by selection.rule precision"),
        ("selector.prior.x", 1, 'selector.prior: {"x": 1} should be auto or audit or a number'),
        ("name.x", 1, 'name: {"x": 1} should be text'),
        ("distill.batch_size", 0, "distill.batch_size: 0 should be at least 1"),
    ],
)
def test_faults_name_the_key_that_is_to_be_mended(home: Path, key: str, value: Any, fault: str) -> None:
    assert faults(home, {key: value}) == [fault]


def test_a_default_may_be_at_fault_in_any_section() -> None:
    @dataclass(frozen=True, config=OPTIONS)
    class Engine:
        kind: str = "steam"
        fuel: Annotated[str | None, Field(validate_default=True)] = None

        @field_validator("fuel")
        @classmethod
        def _needed(cls, value: str | None) -> str | None:
            if value is None:
                raise ValueError("is needed by steam")
            return value

    @dataclass(frozen=True, config=OPTIONS)
    class Train:
        engines: Listed(Engine)  # type: ignore[valid-type]
        spare: Engine | None = None

    raw = {"engines": [{"fuel": "coal"}, {"kind": "steam"}], "spare": {}}
    assert validate(raw, Train)[1] == ["engines.1.fuel: is needed by steam", "spare.fuel: is needed by steam"]


def test_a_key_of_a_list_of_sources_needs_its_number(home: Path) -> None:
    write(home, corpus=[{"uri": "data/u.parquet"}, {"uri": "data/t.parquet"}])
    assert faults(home, {"corpus.uri": "x"}) == [
        "corpus.uri: there is no such key to set; its items are numbered 0 to 1"
    ]
    assert load(home, corpus__1__rows=[0, 3]).corpus[1].rows == (0, 3)


def test_overrides_reach_new_and_old_keys(home: Path) -> None:
    write(home, selector={"steps": 10})
    config = load(home, selector__steps=20, selector__prior=0.25, distill__epochs=2, test={"uri": "data/t.parquet"})
    assert (config.selector.steps, config.selector.prior, config.distill.epochs) == (20, 0.25, 2)
    assert config.test is not None
    assert config.test[0].uri == str(home / "data/t.parquet")


def test_numbers_and_words_of_yaml(home: Path) -> None:
    text = (home / "run.yaml").read_text()
    (home / "run.yaml").write_text(
        text + "name: no\nselector: {lr: 1e-3, prior: .5}\ndistill: {weight_decay: 5E-4}\noutput: 2026-01-01\n"
    )
    config = load(home)
    assert (config.selector.lr, config.selector.prior, config.distill.weight_decay) == (1e-3, 0.5, 5e-4)
    assert (config.name, config.output) == ("no", "2026-01-01")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2", -2),
        ("true", True),
        ("null", None),
        ("[1, 4]", [1, 4]),
        ("{uri: a}", {"uri": "a"}),
        ("s3://a/b", "s3://a/b"),
        ("1e-3x", "1e-3x"),
        ("off", "off"),
        ("2026-01-01", "2026-01-01"),
        ("", ""),
        ("a: b: c", "a: b: c"),
        ("010", 10),
        ("-08", -8),
        ("0o17", 15),
        ("0x1F", 31),
        ("200_000", 200_000),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
    ],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_paths_resolve_against_the_folder_of_the_config(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    write(
        home,
        positives={"uri": ["data/p.parquet", str(home / "data/t.parquet"), "file://data/u.parquet"]},
        test={"uri": "./data/../data/"},
    )
    config = load_config("../run.yaml", {"teacher.weights": "data/../teacher.pt"})
    assert config.positives[0].uris == tuple(f"{home}/data/{n}.parquet" for n in "ptu")
    assert config.test is not None
    assert config.test[0].uri == f"{home}/data"
    assert config.teacher.weights == f"{home}/teacher.pt"


def test_remote_uris_stay_as_they_are(home: Path) -> None:
    assert load(home, corpus__uri=f"local://{home}/data").corpus[0].uri == f"local://{home}/data"


def test_class_names_from_a_file(home: Path) -> None:
    assert load(home, teacher__classes="classes.txt").teacher.class_names == ("shirt", "coat", "bag", "no", "1e-3")
    assert load(home).teacher.class_names is None
    (fault,) = faults(home, {"teacher.classes": "none.txt"})
    assert fault.startswith(f"teacher.classes: cannot read {home}/none.txt: ")
    (home / "classes.txt").write_text("one\ntwo\n")
    assert faults(home, {"teacher.classes": "classes.txt"}) == [
        "teacher.classes: 2 names, but teacher.num_classes is 5"
    ]


def test_weights_that_are_none(home: Path) -> None:
    torch.save([1, 2], home / "list.pt")
    torch.save(build_network("lenet5", **SHAPE), home / "pickle.pt")
    (home / "text.pt").write_text("no weights")
    (home / "folder.pt").mkdir()
    assert faults(home, {"teacher.weights": "list.pt"}) == [
        f"teacher.weights: {home}/list.pt holds a list, not a state_dict"
    ]
    for name in ("pickle.pt", "text.pt"):
        (fault,) = faults(home, {"teacher.weights": name})
        assert fault.startswith(f"teacher.weights: {home}/{name} is not a state_dict that loads with weights_only=True")
    (fault,) = faults(home, {"teacher.weights": "folder.pt"})
    assert fault.startswith(f"teacher.weights: cannot read {home}/folder.pt: ")


def test_weights_from_elsewhere_and_what_is_taken_of_them(
    home: Path, weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    sink = io.BytesIO()
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1)}, sink)
    fsspec.filesystem("memory").pipe("/found/last.ckpt", sink.getvalue())
    assert load(home, teacher__weights="memory://found/last.ckpt").teacher.weights == "memory://found/last.ckpt"
    said = "memory://found/last.ckpt: taken its 'state_dict'; not made: objects of argparse.Namespace"
    assert said in capsys.readouterr().out
    (home / "t.safetensors").write_bytes(dump_safetensors(weights, {}))
    with served(home) as address:  # over HTTP, as from a hub
        load(home, teacher__weights=f"{address}/t.safetensors")
        (fault,) = faults(home, {"teacher.weights": f"{address}/none.safetensors"})
    assert fault.startswith("teacher.weights: ")
    assert "none.safetensors" in fault
    assert capsys.readouterr().out == ""
    (home / "t.safetensors").write_bytes(dump_safetensors(weights, {})[:-8])
    (fault,) = faults(home, {"teacher.weights": "t.safetensors"})
    assert fault.startswith(f"teacher.weights: {home}/t.safetensors is no whole file of safetensors: ")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of a folder, at an address of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_switch_that_no_weights_tell_is_warned_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"num_classes": 5, "channels": 3, "input_size": 64}
    torch.save(build_network("googlenet", **shape).state_dict(), home / "g.pt")
    teacher = {"arch": "googlenet", "weights": "g.pt", "mean": [0.5] * 3, "std": [0.5] * 3, **shape}
    write(home, teacher=teacher)
    load(home)
    assert "warning: teacher.transform_input is not set, and googlenet has such a switch" in capsys.readouterr().out
    for value in (True, False):
        assert load(home, teacher__transform_input=value).teacher.transform_input is value
        assert capsys.readouterr().out == ""
    assert faults(home, {"teacher.transform_input": True, "teacher.arch": "resnet18", "teacher.weights": "teacher.pt"})[
        0
    ].startswith("teacher.transform_input: true is for googlenet and inception_v3 in three channels")


def test_what_an_export_needs_is_known_before(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(home, export={"formats": ["torch"]}).export.formats == ("torch",)  # type: ignore[union-attr]
    monkeypatch.setattr("pukd_ray.preflight.files.find_spec", lambda name: None if name == "onnxscript" else name)
    assert faults(home, {"export": {}}) == [
        "export.formats: needs onnxscript, not installed here: pip install 'pukd_ray[export]'"
    ]
    monkeypatch.setattr("pukd_ray.preflight.files.find_spec", lambda _: None)
    assert faults(home, {"export.formats": ["onnx", "executorch"]}) == [
        "export.formats: needs onnx, onnxscript, onnxruntime, executorch, not installed here: "
        "pip install 'pukd_ray[export,executorch]'"
    ]
    assert faults(home, {"export.formats": []}) == ["export.formats: is empty, or repeats a format"]
    assert faults(home, {"export.formats": ["tflite"]})[0].startswith("export.formats.0: ")


def test_weights_of_another_number_of_classes(home: Path) -> None:
    (fault,) = faults(home, {"teacher.num_classes": 7})
    assert fault.startswith(f"teacher.weights: {home}/teacher.pt, arch lenet5: does not fit LeNet5: wrong shape: ")


def test_files_that_are_no_config(home: Path) -> None:
    def of(path: Path) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return caught.value.faults

    assert of(home / "none.yaml") == [f"--config: cannot read {home}/none.yaml: No such file or directory"]
    assert of(home) == [f"--config: cannot read {home}: Is a directory"]
    path = home / "bad.yaml"
    path.write_text("a: [1\nb: 2")
    assert of(path) == [f"--config: {path} line 2 is not YAML: expected ',' or ']', but got ':'"]
    path.write_text("- 1")
    assert of(path) == [f"--config: {path} must hold keys and values"]
    path.write_bytes(b"\xff\xfe\x00")
    assert of(path)[0].startswith(f"--config: {path} is not YAML: ")


def test_the_config_that_a_run_writes_loads_again(home: Path, tmp_path: Path) -> None:
    write(
        home,
        corpus={"uri": ["data/u.parquet"], "label_map": {0: "no", 1: 3}, "relevant_labels": [1, "x"], "rows": [0, 9]},
        selector={"prior": 1e-05},
        resources={"score_actors": [1, 3]},
    )
    config = load(home, teacher__classes=["a", "no", "1", "null", "ä"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "other/config.yaml") == config


def test_text_that_looks_like_a_number_stays_text(home: Path) -> None:
    for name in ("5e5", "08", "010", "0o17", "1:30"):
        config = load(home, teacher__classes="classes.txt", name=name)
        (home / "config.yaml").write_text(to_yaml(config))
        assert load_config(home / "config.yaml") == config


def test_a_key_that_is_there_twice_is_refused(home: Path) -> None:
    text = (home / "run.yaml").read_text()
    more = "selector: {prior: 0.2}\nseed: 3\nselector:\n  steps: 9\n"
    line = text.count("\n") + 1
    (home / "run.yaml").write_text(text + more)
    assert faults(home) == [
        f"--config: {home}/run.yaml line {line + 2} is not YAML: the key selector is there twice, on line {line} too"
    ]
    (home / "run.yaml").write_text(text + "selector: {lr: 0.1,\n  lr: 0.2}\n")
    assert faults(home) == [
        f"--config: {home}/run.yaml line {line + 1} is not YAML: the key lr is there twice, on line {line} too"
    ]


def test_what_is_merged_may_be_set_again(home: Path) -> None:
    text = (home / "run.yaml").read_text()
    (home / "run.yaml").write_text(f"{text}selector: &a {{lr: 0.1, steps: 5}}\ndistill: {{<<: *a, lr: 0.2}}\n")
    config = load(home)
    assert (config.selector.lr, config.distill.lr, config.distill.steps) == (0.1, 0.2, 5)


def test_a_student_that_begins_with_weights(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_network("resnet8_cifar", **{**SHAPE, "num_classes": 7}).state_dict(), home / "seven.pt")
    config = load(home, student__arch="resnet8_cifar", student__start="seven.pt")
    assert config.student.start == f"{home}/seven.pt"
    assert f"student.start: {home}/seven.pt: taken all but its classifier of 7 classes" in capsys.readouterr().out
    for overrides, fault in (
        ({"student.start": "gone.pt"}, f"student.start: no such file: {home}/gone.pt"),
        ({"student.start": "data/p.parquet"}, f"student.start: {home}/data/p.parquet "),
        ({"student.start": 3}, "student.start: 3 should be text"),
        (
            {"student.start": "seven.pt", "student.arch": "resnet20_cifar"},
            f"student.start: {home}/seven.pt, arch resnet20_cifar: does not fit CifarResNet: missing layer1.1.",
        ),
        ({"student.start": "seven.pt", "student.arch": "resnet8"}, "student.arch: resnet8: no such network"),
    ):
        (found,) = faults(home, overrides)
        assert found.startswith(fault), found


def test_the_config_of_a_teacher_training(home: Path) -> None:
    raw = {
        "teacher": {"arch": "lenet5", "weights": "new.pt", "mean": [0.2], "std": [0.3], **SHAPE},
        "train": {"uri": "data/p.parquet"},
        "epochs": 3,
    }
    (home / "train.yaml").write_text(yaml.safe_dump(raw))
    config = load_teacher_training(home / "train.yaml")
    assert (config.teacher.weights, config.epochs) == (f"{home}/new.pt", 3)  # the file is yet to be written
    assert config.train[0].uri == f"{home}/data/p.parquet"
    with pytest.raises(ConfigError) as caught:
        load_teacher_training(home / "train.yaml", {"train.uri": "none", "teacher.arch": "lenet6", "student.arch": "x"})
    assert [f.partition(": ")[0] for f in caught.value.faults] == ["student.arch", "train.uri", "teacher.arch"]
    begun = load_teacher_training(home / "train.yaml", {"start": "teacher.pt", "epochs": 0, "swa_epochs": 2})
    assert (begun.start, begun.epochs, begun.swa_epochs) == (f"{home}/teacher.pt", 0, 2)
    for start, fault in {
        "gone.pt": f"start: no such file: {home}/gone.pt",
        "data/p.parquet": f"start: {home}/data/p.parquet ",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(fault)):
            load_teacher_training(home / "train.yaml", {"start": start})
    with pytest.raises(ConfigError, match=re.escape(f"start: {home}/teacher.pt, arch lenet5_half: ")):
        load_teacher_training(home / "train.yaml", {"start": "teacher.pt", "teacher.arch": "lenet5_half"})
    for weights, fault in {
        "nosuch://x/t.pt": "Protocol not known",
        "run.yaml/t.pt": "cannot be written, for .*/run.yaml is no folder that",
    }.items():
        with pytest.raises(ConfigError, match=f"teacher.weights: .*{fault}"):
            load_teacher_training(home / "train.yaml", {"teacher.weights": weights})
    with pytest.raises(ConfigError, match="epochs: 0, and swa_epochs too"):
        load_teacher_training(home / "train.yaml", {"epochs": 0})


SECRETS = [
    ("corpus.uri", "s3://AKIAKEY:sE/cR+eT@lake/x/*.parquet", "s3://***@lake/x/*.parquet"),
    ("corpus.uri", ["data/u.parquet", "https://me:sE/cR+eT@host:8080/x"], "https://***@host:8080/x"),
    ("output", "s3://runs/one?access_key=AKIAKEY&secret_key=sE/cR+eT&region=us-east-1", "=***&region=us-east-1"),
    ("teacher.weights", "https://host/t.pt?X-Amz-Signature=sE/cR+eT", "https://host/t.pt?X-Amz-Signature=***"),
    ("positives.uri", "https://x.blob.core.windows.net/c/p.parquet?sv=2024&sig=sE/cR+eT", "?sv=2024&sig=***"),
]


@pytest.mark.parametrize(("key", "value", "shown"), SECRETS)
def test_credentials_are_refused_and_not_quoted(home: Path, key: str, value: Any, shown: str) -> None:
    (fault,) = faults(home, {key: value, "selector.prior": 7})
    assert fault.startswith(key if isinstance(value, str) else f"{key}.1")
    assert shown in fault
    assert fault.endswith("(as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)")
    assert "sE" not in fault
    assert "AKIAKEY" not in fault


def test_a_fault_of_another_key_quotes_no_credentials(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        load_config(home / "run.yaml", {"corpus.uri": "s3://AKIAKEY:sE/cR+eT@lake/x", "name": 3})

    def fail_later() -> None:
        raise RunError("s3://AKIAKEY:sE/cR+eT@lake/x: no")

    def fail_badly() -> None:
        raise KeyError("s3://AKIAKEY:sE/cR+eT@lake/x")

    for body, status in ((fail, 2), (fail_later, 1), (fail_badly, 1)):
        assert run_job(body) == status
        said = capsys.readouterr()
        assert "***@lake/x" in said.err
        assert "sE" not in said.out + said.err


@pytest.mark.parametrize(
    "uri",
    [
        "s3://lake/a@b:c.jpg",
        "s3://lake?region=us-east-1&endpoint_override=127.0.0.1:9000&scheme=http",
        "http://host:8080/a@b.png?page=2&assign=x",
        "abfs://container@account.dfs.core.windows.net/x",
        "/data/a:b@c",
        "hdfs://me@host/x",
    ],
)
def test_what_holds_no_credentials_is_left_as_it_is(uri: str) -> None:
    assert redact(uri) == uri


@pytest.mark.parametrize(
    ("uri", "output", "fault"),
    [
        ("lake", "lake/run", True),
        ("lake/**/*.parquet", "lake/deep/run", True),
        ("lake/*.parquet", "lake/run", False),  # does not look into folders
        ("lake", "lake/_runs/a", False),  # nobody lists what is hidden
        ("lake", "lake-runs/a", False),
        ("s3://bucket/lake", "s3://bucket/lake/run?region=x", True),
    ],
)
def test_a_run_does_not_write_where_it_reads(tmp_path: Path, uri: str, output: str, fault: bool) -> None:
    config = load_config(write_config(tmp_path, write_task(tmp_path, images=20)))
    place = output if "://" in output else str(tmp_path / output)
    source = SourceConfig(uri=uri if "://" in uri else str(tmp_path / uri))
    assert bool(output_faults(replace(config, output=place, corpus=source))) == fault
