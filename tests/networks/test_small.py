import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pukd_ray.corpus.pixels import PixelSpec, decode
from pukd_ray.networks.small import CIFAR_RESNETS, ShortcutA, lenet5, lenet5_half, resnet18_cifar, resnet34_cifar
from pukd_ray.networks.zoo import build_network, count_multiply_adds, count_parameters, load_weights

resnet20_cifar = CIFAR_RESNETS["resnet20_cifar"]


# Published sizes for 10 classes: LeNet-5 on MNIST, the ResNets on CIFAR-10 (He et al. 2016, table 6: 0.27 M, 0.46 M,
# 0.66 M, 0.85 M, 1.7 M).
@pytest.mark.parametrize(
    ("build", "channels", "size", "parameters"),
    [
        (lenet5, 1, 28, 61_706),
        (lenet5, 1, 32, 61_706),
        (lenet5_half, 1, 28, 15_738),
        (CIFAR_RESNETS["resnet8_cifar"], 3, 32, 75_290),
        (resnet20_cifar, 3, 32, 269_722),
        (CIFAR_RESNETS["resnet20_cifar_b"], 3, 32, 272_474),
        (CIFAR_RESNETS["resnet32_cifar"], 3, 32, 464_154),
        (CIFAR_RESNETS["resnet44_cifar"], 3, 32, 658_586),
        (CIFAR_RESNETS["resnet56_cifar"], 3, 32, 853_018),
        (CIFAR_RESNETS["resnet110_cifar"], 3, 32, 1_727_962),
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


def test_a_third_of_the_multiply_adds():
    counts = {
        depth: count_multiply_adds(
            build_network(f"resnet{depth}_cifar", num_classes=10, channels=3, input_size=32), channels=3, input_size=32
        )
        for depth in (8, 20)
    }
    # By hand: stem, and of each 3 x 3 convolution in -> out channels at `side` pixels 9 * in * out * side ** 2.
    convolution = {(i, o, side): 9 * i * o * side**2 for i, o, side in CONVOLUTIONS}
    stem, first, down2, same2, down3, same3 = convolution.values()
    expected = {8: stem + 2 * first + down2 + same2 + down3 + same3 + 640}
    expected[20] = expected[8] + 4 * (first + same2 + same3)
    assert counts == expected
    assert 3 * counts[8] <= counts[20]


CONVOLUTIONS = ((3, 16, 32), (16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8))


def test_shortcut_a_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = torch.arange(2 * 2 * 3 * 3.0).reshape(2, 2, 3, 3)
    y = ShortcutA(2, 3)(x)
    assert y.shape == (2, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, [0, 2]][..., [0, 2]])
    assert not y[:, [0, 3, 4]].any()


@pytest.mark.skipif("PUKD_DATA" not in os.environ, reason="needs the folder PUKD_DATA of real data")
@pytest.mark.parametrize(("depth", "top1"), [(20, 0.810), (56, 0.832)])
def test_public_checkpoints_load_as_found_and_are_as_accurate(depth, top1):
    data = Path(os.environ["PUKD_DATA"])
    (file,) = (data / "teachers").glob(f"resnet{depth}*.th")
    network = build_network(f"resnet{depth}_cifar", num_classes=10, channels=3, input_size=32).eval()
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    taken = load_weights(network, checkpoint, what="teacher.weights")
    assert taken == "its 'state_dict', names after 'module.', 'linear' for 'fc'"
    table = pq.read_table(data / "cifar10" / "test.parquet", columns=["image", "label"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hits = []
    for batch in table.to_batches(max_chunksize=500):
        pixels = [torch.from_numpy(decode(image, PixelSpec(32, 3, "crop"))) for image in batch["image"].to_pylist()]
        with torch.inference_mode():
            hits += (network((torch.stack(pixels) / 255 - mean) / std).argmax(1).numpy() == batch["label"]).tolist()
    assert len(hits) == 10_000
    assert sum(hits) / len(hits) == pytest.approx(top1, abs=0.001)
