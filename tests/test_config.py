"""The dataclasses by themselves: defaults, types, what fits together, and the way to YAML and back."""

import dataclasses
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pukd_ray import config as run_module
from pukd_ray.config import (
    ConfigError,
    DistillConfig,
    ResourcesConfig,
    RunConfig,
    ScoreConfig,
    SelectionConfig,
    SelectorConfig,
    SourceConfig,
    TeacherConfig,
    to_plain,
    worker_faults,
)
from pukd_ray.studies import config as table_module

TEACHER: dict[str, Any] = {
    "arch": "lenet5",
    "weights": "t.pt",
    "num_classes": 2,
    "input_size": 28,
    "mean": [0.1, 0.2, 0.3],
    "std": [1, 1, 1],
}


def run_config(**more: Any) -> RunConfig:
    raw = {"teacher": TEACHER, "positives": {"uri": "p"}, "corpus": {"uri": "u"}} | more
    return TypeAdapter(RunConfig).validate_python(raw)


def test_the_defaults_are_those_of_the_contract() -> None:
    plain = to_plain(run_config())
    assert {k: plain[k] for k in ("name", "output", "output_is_shared", "seed", "test")} == {
        "name": "my-run",
        "output": "runs/my-run",
        "output_is_shared": False,
        "seed": 0,
        "test": None,
    }
    assert {k: plain["teacher"][k] for k in ("classes", "channels", "resize", "taps")} == {
        "classes": None,
        "channels": 3,
        "resize": "crop",
        "taps": None,
    }
    assert plain["selector"] == {
        "trunk": "frozen",
        "loss": "nnpu",
        "prior": "auto",
        "sample": 200_000,
        "steps": 2000,
        "batch_size": 1024,
        "lr": 0.001,
        "batches": "balanced",
        "grid": "auto",
        "views": 8,
        "augment": "crop_flip",
        "blend": True,
    }
    assert plain["score"] == {
        "keep_images": "likely",
        "keep_above": 0.2,
        "chunk_images": None,
        "max_rejected": 0.2,
        "also": [],
    }
    assert plain["selection"] == {
        "rule": "positive",
        "threshold": None,
        "budget": None,
        "order": "top",
        "target_precision": None,
        "deduplicate": "exact",
    }
    assert plain["student"] == {"arch": "resnet18_cifar", "start": None}
    assert plain["export"] is None
    distill = ("epochs", "steps", "batch_size", "class_weights", "epsilon", "adversary")
    assert [plain["distill"][k] for k in distill] == [30, None, 256, "soft", 0.1, "l2_sum_zero"]
    assert plain["resources"] == {
        "gpus_per_actor": "auto",
        "score_actors": "auto",
        "train_workers": 1,
        "gpus_per_train_worker": "auto",
        "autoscales": "auto",
        "precision": "auto",
    }
    assert plain["corpus"] == [
        {
            "uri": "u",
            "format": "auto",
            "image_column": "image",
            "label_column": None,
            "id_column": None,
            "relevant_column": None,
            "relevant": None,
            "relevant_labels": None,
            "label_map": None,
            "split": None,
            "rows": None,
            "per_class": None,
            "skip_per_class": 0,
            "follow_links": False,
        }
    ]


def test_every_key_is_documented() -> None:
    kinds = {n: k for n, k in (vars(run_module) | vars(table_module)).items() if n.endswith("Config")}
    assert len(kinds) == 16
    for kind in kinds.values():
        properties = TypeAdapter(kind).json_schema()["properties"]
        nested = {"selector", "score", "selection", "student", "distill", "resources", "tracking", "teacher", "table"}
        # Inherited keys are documented where they are declared.
        own = {n: p for n, p in properties.items() if n in vars(kind)["__annotations__"]}
        undocumented = [n for n, p in own.items() if "description" not in p and n not in nested]
        assert undocumented == []


def test_nothing_can_be_changed_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (SelectorConfig, "steps", True),
        (SelectorConfig, "steps", "2000"),
        (SelectorConfig, "steps", 10.0),
        (SelectorConfig, "prior", 0),
        (SelectorConfig, "prior", 1.0),
        (SelectorConfig, "prior", True),
        (SelectorConfig, "batch_size", 4),
        (SelectorConfig, "batch_size", 1022),
        (SelectorConfig, "lr", float("nan")),
        (ScoreConfig, "max_rejected", 1.01),
        (ScoreConfig, "chunk_images", 0),
        (SelectionConfig, "rule", "budget"),
        (SelectionConfig, "rule", "quota"),
        (SelectionConfig, "rule", "random"),
        (SelectionConfig, "rule", "teacher_confidence"),
        (SelectionConfig, "rule", "threshold"),
        (SelectionConfig, "rule", "precision"),
        (DistillConfig, "momentum", 1),
        (ResourcesConfig, "score_actors", (3, 2)),
        (ResourcesConfig, "score_actors", (1, 2, 3)),
        (ResourcesConfig, "gpus_per_actor", -0.5),
        (ResourcesConfig, "nonsense", 1),
    ],
)
def test_values_that_are_refused(kind: Any, key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        kind(**{key: value})


@pytest.mark.parametrize(
    "more",
    [
        {"mean": [0.1]},
        {"std": [1, 1]},
        {"std": [1, 0, 1]},
        {"channels": 1},
        {"channels": True},
        {"channels": 4},
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"num_classes": 1},
        {"arch": ""},
    ],
)
def test_teachers_that_are_refused(more: dict[str, Any]) -> None:
    assert TeacherConfig(**TEACHER).mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValidationError):
        TeacherConfig(**TEACHER | more)


@pytest.mark.parametrize(
    "more",
    [
        {"uri": ""},
        {"uri": []},
        {"uri": ["a", ""]},
        {"rows": [3, 3]},
        {"rows": [-1, 3]},
        {"rows": [1]},
        {"per_class": 0},
        {"relevant": 1},
        {"relevant": True, "relevant_column": "x"},
        {"relevant": False, "relevant_labels": [1]},
        {"relevant_column": "x", "relevant_labels": [1]},
    ],
)
def test_sources_that_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(**{"uri": "a"} | more)


def test_sources_are_one_mapping_or_a_list() -> None:
    config = run_config(corpus=[{"uri": "a"}, {"uri": ["b", "c"], "rows": [0, 5]}], test={"uri": "t"})
    assert [s.uris for s in config.corpus] == [("a",), ("b", "c")]
    assert config.corpus[1].rows == (0, 5)
    assert config.test == (SourceConfig(uri="t"),)
    with pytest.raises(ValidationError):
        run_config(corpus=[])


def test_keys_of_a_label_map_are_text() -> None:
    assert SourceConfig(uri="a", label_map={0: 1, "x": "y"}).label_map == {"0": 1, "x": "y"}
    with pytest.raises(ValidationError):
        SourceConfig(uri="a", label_map={True: 1})


def test_the_plain_form_makes_the_same_config_again() -> None:
    config = run_config(
        corpus={"uri": ["a", "b"], "label_map": {0: 1, "x": "y"}, "relevant_labels": [0, "x"], "rows": [1, 2]},
        selector={"prior": 0.3},
        resources={"score_actors": [1, 4], "gpus_per_actor": 0.5},
    )
    assert TypeAdapter(RunConfig).validate_python(to_plain(config)) == config


def test_workers_must_divide_both_batches() -> None:
    assert worker_faults(4, 1024, 256) == []
    assert worker_faults(3, 1024, 256) == [
        "resources.train_workers: 3 does not divide a quarter of selector.batch_size (256)",
        "resources.train_workers: 3 does not divide distill.batch_size (256)",
    ]
    assert worker_faults(3, 24, 256) == ["resources.train_workers: 3 does not divide distill.batch_size (256)"]
    with pytest.raises(ValidationError, match=r"resources\.train_workers: 3 does not divide a quarter"):
        run_config(resources={"train_workers": 3})


def test_an_elastic_group_need_not_divide_them() -> None:
    assert run_config(resources={"train_workers": [2, 3]}).resources.train_workers == (2, 3)
    assert worker_faults((1, 48), 128, 32) == [
        "resources.train_workers: 48 is more than a quarter of selector.batch_size (32)",
        "resources.train_workers: 48 is more than distill.batch_size (32)",
    ]
    with pytest.raises(ValidationError, match="min is above max"):
        run_config(resources={"train_workers": [3, 2]})


def test_an_error_has_its_faults_as_lines() -> None:
    error = ConfigError(["a: one", "b: two"])
    assert error.faults == ["a: one", "b: two"]
    assert str(error) == "a: one\nb: two"
