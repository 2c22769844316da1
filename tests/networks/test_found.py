"""Weights as practitioners leave them: what lies in a file, and which of it is a network's."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from pukd_ray.config import TeacherConfig
from pukd_ray.networks.found import read_checkpoint
from pukd_ray.networks.teacher import Normalise, dump_safetensors, dump_state, load_state
from pukd_ray.networks.zoo import build_network, find_weights, load_weights, outline_network

TEN_GRAY = {"num_classes": 10, "channels": 1, "input_size": 28}
COLOUR = {"num_classes": 7, "channels": 3, "input_size": 64}


def saved(content: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(build_network("lenet5", **TEN_GRAY).state_dict())


def loads(data: bytes, weights: dict[str, torch.Tensor], arch: str = "lenet5", **numbers: int) -> str:
    """What was taken; the weights must have come through."""
    network = build_network(arch, **(numbers or TEN_GRAY))
    taken = load_weights(network, read_checkpoint(data).content, what="w")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items() if name in weights)
    return taken


def behind(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


class Calls:
    """Of a checkpoint: calls a function where its pickle is run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class CfgNode(dict[str, Any]):
    """Of a checkpoint: settings as yacs and its heirs hold them, with attributes beside the entries."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__["__immutable__"] = True


# What frameworks write, by their own documentation and code: Lightning's save_checkpoint, timm's CheckpointSaver,
# torch.optim.swa_utils, torch.compile, the ImageNet example of PyTorch.
CASES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "lightning": (
        lambda w: {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": behind("model.", w) | {"criterion.weight": torch.ones(10)},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"EarlyStopping{'monitor': 'loss'}": {"best_score": torch.tensor(0.1)}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(depth=5), "path": Path("x")},
        },
        "its 'state_dict', names after 'model.'",
    ),
    "lightning, net": (lambda w: {"state_dict": behind("net.", w)}, "its 'state_dict', names after 'net.'"),
    "compiled": (lambda w: behind("_orig_mod.", w), "names after '_orig_mod.'"),
    "compiled in Lightning": (
        lambda w: {"state_dict": behind("model._orig_mod.", w)},
        "its 'state_dict', names after 'model._orig_mod.'",
    ),
    "data parallel": (lambda w: {"state_dict": behind("module.", w)}, "its 'state_dict', names after 'module.'"),
    "AveragedModel": (
        lambda w: {"n_averaged": torch.tensor(7), **behind("module.", w)},
        "names after 'module.'",
    ),
    "model_state_dict": (
        lambda w: {"epoch": 1, "model_state_dict": w, "optimizer_state_dict": {"state": {}}, "loss": np.float64(0.5)},
        "its 'model_state_dict'",
    ),
    "timm": (
        lambda w: {
            "epoch": 9,
            "arch": "lenet5",
            "state_dict": w,
            "state_dict_ema": w,
            "args": argparse.Namespace(lr=0.1, opt="sgd"),
            "metric": 81.2,
        },
        "its 'state_dict'",
    ),
    "EMA alone": (lambda w: {"model_ema": behind("module.", w)}, "its 'model_ema', names after 'module.'"),
    "teacher of a distillation": (
        lambda w: {"teacher": behind("backbone.", w)},
        "its 'teacher', names after 'backbone.'",
    ),
    "detectron": (
        lambda w: {
            "model": w,
            "cfg": CfgNode(lr=0.1, solver=CfgNode(steps=[1, 2])),
            "history": collections.defaultdict(list, {"loss": [1.0, 0.5]}),
            "args": argparse.Namespace(depth=5, items=3),
        },
        "its 'model'",
    ),
    "half": (lambda w: {k: v.half() for k, v in w.items()}, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_frameworks_leave_loads(name: str, weights: dict[str, torch.Tensor]) -> None:
    make, taken = CASES[name]
    if name == "half":
        weights = {k: v.half().float() for k, v in weights.items()}
    assert loads(saved(make(weights)), weights) == taken


def test_objects_beside_the_weights_are_skipped_and_never_run(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    touched = tmp_path / "touched"
    data = saved(
        {"state_dict": weights, "hyper_parameters": {"a": Calls(open, str(touched), "w"), "b": partial(max, 1)}}
    )
    checkpoint = read_checkpoint(data)
    assert set(checkpoint.skipped) == {"functools.partial", "builtins.max", "io.open"}
    assert loads(data, weights) == "its 'state_dict'"
    assert not touched.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert touched.exists(), "the file was harmless: nothing is tested"


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (Path.touch, Path("{}"))])
def test_what_cannot_be_skipped_is_refused_and_not_run(
    call: tuple[Any, ...], tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    touched = tmp_path / "touched"
    function, argument = call
    evil = Calls(function, type(argument)(str(argument).format(touched)))
    with pytest.raises(ValueError, match=r"\(it holds objects of .*\): write one with torch\.save"):
        read_checkpoint(saved({"state_dict": weights, "x": evil}))
    assert not touched.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_network_is_refused_in_one_line(zipped: bool) -> None:
    sink = io.BytesIO()
    torch.save(build_network("lenet5", **TEN_GRAY), sink, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^is not a state_dict that loads with weights_only=True \(") as caught:
        read_checkpoint(sink.getvalue())
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "weights_only=False" not in text
    if zipped:
        assert "LeNet5" in text
        assert text.endswith("): write one with torch.save(model.state_dict(), ...)")


def test_files_of_an_older_torch_are_refused_without_its_advice(weights: dict[str, torch.Tensor]) -> None:
    sink = io.BytesIO()
    content = {"state_dict": weights, "args": argparse.Namespace(depth=5)}
    torch.save(content, sink, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"\(.*argparse\.Namespace was not an .*\): write one with") as caught:
        read_checkpoint(sink.getvalue())
    assert "safe_globals" not in str(caught.value)


def test_an_object_in_place_of_the_whole_is_refused() -> None:
    held = argparse.Namespace(history=collections.defaultdict(list, {"loss": [1.0]}))
    with pytest.raises(ValueError, match=r"\(it holds objects of argparse\.Namespace, builtins\.list, collections\."):
        read_checkpoint(saved(held))


@pytest.mark.parametrize("keys", [lambda i: i, lambda i: (i, 1)], ids=["numbers", "tuples"])
@pytest.mark.parametrize("nested", [True, False])
def test_tensors_without_names_do_not_fit(
    keys: Callable[[int], Any], nested: bool, weights: dict[str, torch.Tensor]
) -> None:
    content: Any = {keys(i): value for i, value in enumerate(weights.values())}
    with pytest.raises(ValueError, match=r"^w: does not fit LeNet5: missing conv1\.weight, "):
        loads(saved({"model": content, "epoch": 1} if nested else content), weights)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_parts_that_are_alike_but_for_their_layout_are_one(
    layout: torch.layout, weights: dict[str, torch.Tensor]
) -> None:
    sparse = {k: v.to_sparse(layout=layout) if k == "fc1.weight" else v for k, v in weights.items()}
    assert loads(saved({"model": weights, "model_ema": sparse}), weights) == "its 'model'"
    with pytest.raises(ValueError, match="several parts of it fit"):
        loads(saved({"model": {k: v + 1 for k, v in weights.items()}, "model_ema": sparse}), weights)


def test_parts_that_differ_are_a_question(weights: dict[str, torch.Tensor]) -> None:
    other = {k: v + 1 for k, v in weights.items()}
    with pytest.raises(
        ValueError, match=r"several parts of it fit LeNet5: its 'model' and its 'model_ema'; save the one"
    ):
        loads(saved({"model": weights, "model_ema": other}), weights)


def test_safetensors_in_and_out(weights: dict[str, torch.Tensor]) -> None:
    assert loads(save(weights), weights) == ""
    assert loads(save(behind("model.", weights), {"format": "pt"}), weights) == "names after 'model.'"
    with pytest.raises(ValueError, match=r"^is no whole file of safetensors: "):
        read_checkpoint(save(weights)[:-10])
    shared = {"a": torch.ones(3), "b": torch.ones(3)}
    shared["b"] = shared["a"]
    data = dump_safetensors(shared, {"classes": ["x", "ä"], "num_classes": 2})
    assert {k: v.tolist() for k, v in load_state(data).items()} == {"a": [1, 1, 1], "b": [1, 1, 1]}


@pytest.mark.parametrize("arch", ["mnasnet0_5", "resnet20_cifar", "vit_b_32"])
def test_a_student_loads_by_torchvisions_own_means(arch: str, tmp_path: Path) -> None:
    """MNASNet refuses a state_dict that does not tell its layers' versions; older Transformers had other names."""
    numbers = {"num_classes": 3, "channels": 3, "input_size": 32}
    torch.manual_seed(1)
    network = build_network(arch, **numbers).eval()
    data = dump_safetensors(network.state_dict(), {"arch": arch})
    (tmp_path / "s.safetensors").write_bytes(data)
    other = build_network(arch, **numbers).eval()
    other.load_state_dict(torch.load(io.BytesIO(dump_state(network.state_dict())), weights_only=True))
    third = build_network(arch, **numbers).eval()
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        about = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert json.loads(about["arch"]) == arch
    assert about["format"] == "pt"
    kept = network.state_dict()
    kept.update(state)
    kept._metadata = json.loads(about["_metadata"])  # type: ignore[attr-defined]
    third.load_state_dict(kept)
    ours = build_network(arch, **numbers).eval()
    load_weights(ours, load_state(data), what="w")
    for found in (other, third, ours):
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in found.state_dict().items())


@pytest.mark.parametrize(("arch", "head"), [("googlenet", "aux1"), ("inception_v3", "AuxLogits")])
def test_auxiliary_classifiers_as_torchvision_saves_them_are_left_out(arch: str, head: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        whole = models.get_model(arch, weights=None, num_classes=7, init_weights=False).state_dict()
    assert any(name.startswith(head) for name in whole)
    assert find_weights(outline_network(arch, num_classes=7, channels=3, input_size=96), whole).taken == ""


def test_transform_input_is_what_torchvision_computes() -> None:
    from torchvision import models

    config = {"arch": "googlenet", "weights": "w", **COLOUR, "mean": [0.45, 0.45, 0.4], "std": [0.25, 0.22, 0.23]}
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain, renormalised = (Normalise(TeacherConfig(**config, transform_input=v))(pixels) for v in (None, True))
    with torch.device("meta"):
        network = models.googlenet(
            weights=None, num_classes=7, aux_logits=False, init_weights=False, transform_input=True
        )
    torch.testing.assert_close(network._transform_input(plain), renormalised, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, renormalised, atol=0.1)
    for wrong in ({"arch": "resnet18"}, {"channels": 1, "mean": [0.5], "std": [0.5]}):
        with pytest.raises(ValueError, match="true is for googlenet and inception_v3 in three channels"):
            TeacherConfig(**config | wrong, transform_input=True)


@pytest.mark.parametrize(
    ("arch", "old"),
    [
        ("vit_b_32", lambda n: n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")),
        ("densenet121", lambda n: n.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2.")),
    ],
)
def test_names_that_torchvision_has_changed_since(arch: str, old: Callable[[str], str]) -> None:
    outline = outline_network(arch, **COLOUR)
    now = outline.state_dict()
    before = {old(name): value for name, value in now.items()}
    assert before.keys() != now.keys()
    for content in (before, {"state_dict": {f"module.{k}": v for k, v in before.items()}}):
        found = find_weights(outline, content)
        assert all(found.state[name] is now[name] for name in now)
