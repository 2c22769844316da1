import sys
import warnings

import pytest
import torch
from torch import nn

from pukd_ray.networks.zoo import (
    build_network,
    count_parameters,
    find_start,
    find_weights,
    load_weights,
    outline_network,
    put_weights,
)

TEN_GRAY = {"num_classes": 10, "channels": 1, "input_size": 28}


def linear_factory(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * input_size**2, num_classes))


def value_reading_factory(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    depth = int(torch.ones(2).sum().item())  # impossible on the meta device
    flat = channels * input_size**2
    return nn.Sequential(nn.Flatten(), *(nn.Linear(flat, flat) for _ in range(depth)), nn.Linear(flat, num_classes))


def failing_factory(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    raise KeyError(f"no recipe for {num_classes} classes of {channels} x {input_size}")


def wrong_factory(**_numbers: int) -> list[int]:
    return []


not_callable = 3


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("lenet5", 28),
        ("resnet20_cifar", 32),
        ("resnet18", 64),
        ("vit_b_32", 64),
        ("googlenet", 64),
        ("swin_t", 64),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_builds_what_it_is_asked_for(arch, size, channels):
    with torch.device("meta"):  # shapes say enough here
        network = build_network(arch, num_classes=7, channels=channels, input_size=size)
        logits = network.eval()(torch.empty(2, channels, size, size))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_train_on_plain_logits_and_do_not_warn(arch):
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        network = build_network(arch, num_classes=7, channels=3, input_size=96)
        logits = network.train()(torch.empty(2, 3, 96, 96))
    assert logits.shape == (2, 7)


def test_gray_stem_sees_what_the_rgb_stem_sees_in_a_gray_image():
    torch.manual_seed(0)
    rgb = build_network("resnet18", num_classes=7, channels=3, input_size=32)
    torch.manual_seed(0)
    gray = build_network("resnet18", num_classes=7, channels=1, input_size=32)
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(gray.conv1(images), rgb.conv1(images.expand(-1, 3, -1, -1)))


def test_factory():
    network = build_network(f"{__name__}:linear_factory", num_classes=7, channels=3, input_size=4)
    assert network(torch.zeros(2, 3, 4, 4)).shape == (2, 7)


def test_timm_convolutional_and_fixed_size():
    pytest.importorskip("timm")
    for arch in ("timm:resnet10t", "timm:vit_tiny_patch16_224"):
        network = build_network(arch, num_classes=7, channels=1, input_size=48).eval()
        assert network(torch.zeros(2, 1, 48, 48)).shape == (2, 7)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet18: .*pip install 'pukd_ray\[timm\]'"):
        build_network("timm:resnet18", **TEN_GRAY)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet34_cifr", "resnet34_cifr: no such network; did you mean resnet34_cifar"),
        ("resnet5O", "resnet5O: no such network; did you mean .*resnet50"),
        ("fcn_resnet50", "fcn_resnet50: no such network"),  # torchvision has it, but for segmentation
        ("", "no such network"),
        ("no.such.package:factory", "no.such.package:factory: cannot be imported: .*No module named 'no'"),
        (f"{__name__}:nothing", "cannot be imported: .*nothing"),
        (f"{__name__}:not_callable", "not_callable is int, not a callable"),
        (
            f"{__name__}:failing_factory",
            "failing_factory: cannot be built with num_classes=10.*no recipe for 10",
        ),
        (f"{__name__}:wrong_factory", "wrong_factory: returned list, not a torch.nn.Module"),
        ("vit_b_32", "vit_b_32: cannot be built with .*input_size=28"),
        ("timm:resnet18x", "timm:resnet18x: no such network; did you mean timm:resnet18"),
    ],
)
def test_names_the_arch_that_cannot_be_built(arch, message):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as caught:
        build_network(arch, **TEN_GRAY)
    assert "\n" not in str(caught.value)


def test_count_parameters_counts_shared_ones_once_and_no_buffers():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer, nn.BatchNorm1d(3))) == 12 + 6


def test_load_weights():
    weights = build_network("lenet5", **TEN_GRAY).state_dict()
    network = build_network("lenet5", **TEN_GRAY)
    load_weights(network, weights, what="teacher.weights")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_load_weights_into_a_network_on_the_meta_device():
    original = build_network("resnet20_cifar", num_classes=10, channels=3, input_size=32).eval()
    with torch.device("meta"):
        network = build_network("resnet20_cifar", num_classes=10, channels=3, input_size=32).eval()
    load_weights(network, original.state_dict(), what="teacher.weights")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), original(images))


def test_load_weights_of_the_time_before_batch_counters():
    network = build_network("resnet20_cifar", num_classes=10, channels=3, input_size=32)
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_weights(network, weights, what="teacher.weights")


@pytest.mark.parametrize(
    ("arch", "classifier"),
    [
        ("resnet20_cifar", {"fc.weight", "fc.bias"}),
        ("mobilenet_v3_small", {"classifier.3.weight", "classifier.3.bias"}),
        ("densenet121", {"classifier.weight", "classifier.bias"}),
        ("vit_b_32", {"heads.head.weight", "heads.head.bias"}),
    ],
)
def test_a_training_begins_with_weights_of_other_classes(arch, classifier):
    shape = {"channels": 3, "input_size": 64}
    there = build_network(arch, num_classes=100, **shape).state_dict()
    network = build_network(arch, num_classes=7, **shape)
    found = find_start(network, {"model": {f"module.{k}": v for k, v in there.items()}}, arch, **shape)
    assert found.taken == "its 'model', names after 'module.', all but its classifier of 100 classes"
    before = {name: value.clone() for name, value in network.state_dict().items()}
    put_weights(network, found)
    now = network.state_dict()
    assert {name for name in now if name not in found.state} == classifier
    assert all(torch.equal(now[name], (before if name in classifier else there)[name]) for name in now)


def test_a_training_begins_with_all_of_its_own_classes_and_with_nothing_else():
    shape = {"channels": 3, "input_size": 32}
    network = build_network("resnet20_cifar", num_classes=10, **shape)
    there = network.state_dict()
    assert find_start(network, there, "resnet20_cifar", **shape).state.keys() == there.keys()
    others = {**there, "fc.weight": torch.zeros(5, 32), "fc.bias": torch.zeros(5)}  # the classifier of another network
    for weights, fault in (
        (others, "wrong shape: fc.weight is .5, 32. instead"),
        ({"a": torch.zeros(3)}, "missing conv1"),
    ):
        with pytest.raises(ValueError, match=f"does not fit CifarResNet: {fault}"):
            find_start(network, weights, "resnet20_cifar", **shape)


def renamed(weights, names):
    return {names.get(name, name): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "fc3.bias"}, "does not fit LeNet5: missing fc3.bias"),
        (lambda w: {**w, "extra": w["fc3.bias"]}, "does not fit LeNet5: unexpected extra"),
        (
            lambda w: renamed(w, {"fc1.bias": "fc1.b"}),
            "does not fit LeNet5: missing fc1.bias; unexpected fc1.b",
        ),
        (
            lambda w: {**w, "fc3.bias": torch.zeros(7)},
            "does not fit LeNet5: wrong shape: fc3.bias is [7] instead of [10]",
        ),
        (
            lambda w: {**w, "fc3.bias": 0.5},
            "does not fit LeNet5: wrong shape: fc3.bias is a float instead of [10]",
        ),
        (
            lambda _: {},
            "does not fit LeNet5: missing conv1.weight, conv1.bias, conv2.weight and 7 more",
        ),
        (
            lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items() if k != "fc3.bias"}, "epoch": 3},
            "does not fit LeNet5: missing fc3.bias",
        ),
        (
            lambda w: {"model": w, "ema": {k: v + 1 for k, v in w.items()}},
            "several parts of it fit LeNet5: its 'model' and its 'ema'; save the one that is meant alone",
        ),
        (lambda w: list(w.values()), "holds list, not a state_dict"),
    ],
)
def test_weights_that_do_not_fit(change, fault):
    network = build_network("lenet5", **TEN_GRAY)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = change(build_network("lenet5", **TEN_GRAY).state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full
        find_weights(outline_network("lenet5", **TEN_GRAY), weights)
    assert str(caught.value) == fault
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full
        load_weights(network, weights, what="teacher.weights")
    assert str(caught.value) == f"teacher.weights: {fault}"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_names_that_start_with_module_may_be_right():
    network = nn.Sequential()
    network.add_module("module", nn.Linear(2, 2))
    load_weights(network, network.state_dict(), what="teacher.weights")


@pytest.mark.parametrize(
    "arch", ["lenet5", "densenet121", f"{__name__}:linear_factory", f"{__name__}:value_reading_factory"]
)
def test_weights_that_fit(arch):
    numbers = {"num_classes": 10, "channels": 1, "input_size": 32}
    weights = build_network(arch, **numbers).state_dict()
    found = find_weights(outline_network(arch, **numbers), weights)
    assert found.taken == ""
    assert all(found.state[name] is weights[name] for name in weights)


def test_an_outline_allocates_nothing(monkeypatch):
    numbers = {"num_classes": 10, "channels": 3, "input_size": 64}
    with torch.device("meta"):
        weights = build_network("vit_b_32", **numbers).state_dict()
    devices = set()
    register = nn.Module.register_parameter

    def spy(module, name, parameter):
        if parameter is not None:
            devices.add(parameter.device.type)
        register(module, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", spy)
    assert find_weights(outline_network("vit_b_32", **numbers), weights).taken == ""
    assert devices == {"meta"}


def test_outline_of_an_unknown_arch():
    with pytest.raises(ValueError, match="lenet6: no such network"):
        outline_network("lenet6", **TEN_GRAY)


def test_a_part_that_is_there_twice_is_no_question():
    weights = build_network("lenet5", **TEN_GRAY).state_dict()
    network = build_network("lenet5", **TEN_GRAY)
    assert load_weights(network, {"model": weights, "best": dict(weights)}, what="w") == "its 'model'"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda w: {"state_dict": w, "epoch": 3, "best": torch.tensor(0.9)}, "its 'state_dict'"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "names after 'module.'"),
        (
            lambda w: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in w.items()}},
            "names after 'module.'",
        ),
        (
            lambda w: {"a": {"b": {f"_orig_mod.module.{k}": v for k, v in w.items()}}},
            "its 'a.b', names after '_orig_mod.module.'",
        ),
        (
            lambda w: {"model": {k.replace("fc3.", "linear."): v for k, v in w.items()}, "optimizer": {"state": {}}},
            "its 'model', 'linear' for 'fc3'",
        ),
        (lambda w: {**w, "aux1.fc.weight": torch.zeros(2)}, ""),
        (  # the lengths of LeNet's two hidden layers differ: no doubt which is which
            lambda w: {k.replace("fc2.", "net.hidden."): v for k, v in w.items()},
            "'net.hidden' for 'fc2'",
        ),
    ],
)
def test_weights_as_training_scripts_leave_them(change, taken):
    weights = build_network("lenet5", **TEN_GRAY).state_dict()
    network = build_network("lenet5", **TEN_GRAY)
    assert load_weights(network, change(weights), what="teacher.weights") == taken
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
