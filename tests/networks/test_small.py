import pytest
import torch

from pukd_ray.networks.small import lenet5, lenet5_half, resnet18_cifar, resnet20_cifar, resnet34_cifar
from pukd_ray.networks.zoo import count_parameters


# Published sizes for 10 classes: LeNet-5 on MNIST, the ResNets on CIFAR-10 (ResNet-20 with projections).
@pytest.mark.parametrize(
    ("build", "channels", "size", "parameters"),
    [
        (lenet5, 1, 28, 61_706),
        (lenet5, 1, 32, 61_706),
        (lenet5_half, 1, 28, 15_738),
        (resnet20_cifar, 3, 32, 272_474),
        (resnet18_cifar, 3, 32, 11_173_962),
        (resnet34_cifar, 3, 32, 21_282_122),
    ],
)
def test_published_sizes(build, channels, size, parameters):
    assert count_parameters(build(num_classes=10, channels=channels, input_size=size)) == parameters


@pytest.mark.parametrize("build", [lenet5, lenet5_half, resnet20_cifar, resnet18_cifar])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 16), (1, 45)])
def test_logits_for_any_channels_and_size(build, channels, size):
    network = build(num_classes=7, channels=channels, input_size=size).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("build", "side"), [(resnet20_cifar, 8), (resnet18_cifar, 4), (resnet34_cifar, 4)])
def test_small_stem_keeps_resolution(build, side):
    """32 pixels leave the last stage as 8 after two strides and as 4 after three, so the stem has none."""
    network = build(num_classes=10, channels=3, input_size=32).eval()
    last = network.layer3 if build is resnet20_cifar else network.layer4
    shapes = []
    last.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[2:])))
    network(torch.zeros(1, 3, 32, 32))
    assert shapes == [(side, side)]


def test_lenet_has_no_batch_statistics():
    network = lenet5(num_classes=10, channels=1, input_size=28)
    assert list(network.buffers()) == []


def test_lenet_names_the_smallest_size():
    with pytest.raises(ValueError, match="at least 12 pixels, not 11"):
        lenet5(num_classes=10, channels=1, input_size=11)
    assert lenet5(num_classes=10, channels=1, input_size=12)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)
