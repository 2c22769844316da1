from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from pukd_ray.networks.features import MultiScaleExtractor
from pukd_ray.networks.selector import PixelSelector, SelectorHead
from pukd_ray.networks.zoo import build_network
from pukd_ray.selection.training import logits_of


def features(*indices):
    return tuple(f"features.{index}" for index in indices)


LAYERS = ("layer1", "layer2", "layer3", "layer4")
# Widths are those of the stages in the papers.
FAMILIES = [
    ("lenet5", 1, 28, ("pool1", "pool2", "relu3", "relu4"), (6, 16, 120, 84)),
    ("lenet5_half", 3, 32, ("pool1", "pool2", "relu3", "relu4"), (3, 8, 60, 42)),
    ("resnet20_cifar", 3, 32, LAYERS[:3], (16, 32, 64)),
    ("resnet18_cifar", 3, 32, LAYERS, (64, 128, 256, 512)),
    ("resnet34_cifar", 3, 32, LAYERS, (64, 128, 256, 512)),
    ("resnet18", 1, 64, LAYERS, (64, 128, 256, 512)),
    ("resnet50", 3, 64, LAYERS, (256, 512, 1024, 2048)),
    ("regnet_y_400mf", 3, 64, tuple(f"trunk_output.block{i}" for i in (1, 2, 3, 4)), (48, 104, 208, 440)),
    ("densenet121", 1, 64, tuple(f"features.denseblock{i}" for i in (1, 2, 3, 4)), (256, 512, 1024, 1024)),
    ("mobilenet_v2", 3, 64, features(3, 6, 13, 18), (24, 32, 96, 1280)),
    ("mobilenet_v3_large", 1, 64, features(3, 6, 12, 16), (24, 40, 112, 960)),
    ("mobilenet_v3_small", 3, 64, features(1, 3, 8, 12), (16, 24, 48, 576)),
    ("efficientnet_b0", 3, 64, features(2, 3, 5, 8), (24, 40, 112, 1280)),
    ("efficientnet_v2_s", 3, 64, features(2, 3, 5, 7), (48, 64, 160, 1280)),
    ("shufflenet_v2_x0_5", 3, 64, ("stage2", "stage3", "stage4", "conv5"), (48, 96, 192, 1024)),
    ("convnext_tiny", 3, 64, features(1, 3, 5, 7), (96, 192, 384, 768)),
    ("swin_t", 3, 64, features(1, 3, 5, 7), (96, 192, 384, 768)),
    # by resolution
    ("vgg11_bn", 3, 32, features(6, 13, 20, 27), (128, 256, 512, 512)),
    ("alexnet", 3, 96, features(1, 4, 11), (64, 192, 256)),
    ("squeezenet1_1", 3, 96, features(1, 4, 7, 12), (64, 128, 256, 512)),
    ("googlenet", 3, 64, ("conv3", "inception3b", "inception4e", "inception5b"), (192, 480, 832, 1024)),
    ("inception_v3", 3, 96, ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"), (192, 288, 768, 2048)),
    ("mnasnet0_5", 3, 64, ("layers.8", "layers.9", "layers.11", "layers.16"), (16, 24, 48, 1280)),
    ("timm:resnet10t", 1, 64, LAYERS, (64, 128, 256, 512)),
    ("timm:vit_tiny_patch16_224", 3, 48, tuple(f"blocks.{i}" for i in (2, 5, 8, 11)), (192, 192, 192, 192)),
]


@pytest.mark.parametrize(("arch", "channels", "size", "taps", "widths"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_default_taps(arch, channels, size, taps, widths):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    model = build_network(arch, num_classes=7, channels=channels, input_size=size).eval()
    extractor = MultiScaleExtractor(model, input_shape=(channels, size, size))
    assert extractor.taps == taps
    assert extractor.channels == sum(widths)
    images = torch.rand(3, channels, size, size)
    with torch.no_grad():
        found, logits = extractor.features_and_logits(images)
        assert found.shape == (3, sum(widths))
        assert torch.equal(logits, model(images))
        assert torch.equal(found, extractor(images))
        offset = 0
        for tap, width in zip(taps, widths, strict=True):  # each tap alone: the order and every single width
            alone = MultiScaleExtractor(model, [tap], input_shape=(channels, size, size))
            assert alone.channels == width
            assert torch.equal(found[:, offset : offset + width], alone(images))
            offset += width
    pixels = (images * 255).to(torch.uint8)
    in_cells = MultiScaleExtractor(model, input_shape=(channels, size, size), grid=2)
    scores = logits_of(PixelSelector(in_cells, nn.Identity(), SelectorHead(in_cells.channels)), pixels.numpy())
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()


def tiny_vit():
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, num_layers=8, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5)
    nn.init.normal_(model.heads[0].weight)  # zero by default, and then the logits could not tell
    return model.eval()


def test_maps_are_averaged_over_their_pixels():
    model = build_network("resnet20_cifar", num_classes=10, channels=3, input_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        map1 = model.layer1(model.relu(model.bn1(model.conv1(images))))
        map2 = model.layer2(map1)
        expected = torch.cat([map1.mean((2, 3)), map2.mean((2, 3)), model.layer3(map2).mean((2, 3))], dim=1)
        torch.testing.assert_close(MultiScaleExtractor(model)(images), expected)


def test_tokens_are_averaged_without_the_class_token():
    model = tiny_vit()
    images = torch.rand(2, 3, 16, 16)
    extractor = MultiScaleExtractor(model)
    assert extractor.taps == tuple(f"encoder.layers.encoder_layer_{i}" for i in (1, 3, 5, 7))
    with torch.no_grad():
        tokens = model._process_input(images)
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], dim=1) + model.encoder.pos_embedding
        expected = []
        for index, layer in enumerate(model.encoder.layers):
            tokens = layer(tokens)
            if index % 2:
                expected.append(tokens[:, 1:].mean(dim=1))
        torch.testing.assert_close(extractor(images), torch.cat(expected, dim=1))


def test_distillation_token_is_no_patch_either():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "depth": 4, "embed_dim": 12, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    model.blocks[3].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        found = MultiScaleExtractor(model, ["blocks.3"], input_shape=(3, 32, 32))(images)
    torch.testing.assert_close(found, outputs[-1][:, 2:].mean(dim=1))


@pytest.mark.parametrize("size", [64, 384])  # at 384 pixels the first stage gives 96 x 96 pixels of 96 channels
def test_swin_maps_have_their_channels_last(size):
    model = build_network("swin_t", num_classes=5, channels=3, input_size=size).eval()
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        found = MultiScaleExtractor(model, features(1, 3), input_shape=(3, size, size))(images)
        first = model.features[:2](images)
        expected = torch.cat([first.mean((1, 2)), model.features[2:4](first).mean((1, 2))], dim=1)
    torch.testing.assert_close(found, expected)


def test_two_dimensional_outputs_stay_as_they_are():
    model = build_network("lenet5", num_classes=10, channels=1, input_size=28)
    images = torch.rand(2, 1, 28, 28)
    extractor = MultiScaleExtractor(model, ["fc2", "fc3"])
    assert torch.equal(extractor(images), torch.cat([nn.Sequential(*list(model)[:10])(images), model(images)], dim=1))


def test_in_place_activation_does_not_change_its_inputs_features():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    found = MultiScaleExtractor(model, ["0"], input_shape=(3, 32, 32))(images)
    torch.testing.assert_close(found, model[0](images).mean((2, 3)))


def test_operations_as_taps():
    model = tiny_vit()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = MultiScaleExtractor(model).features_and_logits(images)
        operations = MultiScaleExtractor(model, [f"encoder.layers.encoder_layer_{i}.add_1" for i in (1, 3, 5, 7)])
        mixed = MultiScaleExtractor(
            model, ["encoder.layers.encoder_layer_1", *operations.taps[1:3], "encoder.layers.encoder_layer_7"]
        )
        for extractor in (operations, mixed):
            for found, wanted in zip(extractor.features_and_logits(images), expected, strict=True):
                torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("taps", [None, ["layer1", "layer2.0.add"]], ids=["modules", "operations"])
class TestTheModelIsUsedAndNotCopied:
    def test_training_the_model_changes_the_features(self, taps):
        model = build_network("resnet18_cifar", num_classes=10, channels=3, input_size=32).eval()
        extractor = MultiScaleExtractor(model, taps, input_shape=(3, 32, 32))
        images = torch.rand(2, 3, 32, 32)
        before = extractor(images)
        before.sum().backward()
        assert model.conv1.weight.grad.abs().sum() > 0
        with torch.no_grad():
            model.conv1.weight.mul_(2)
        assert not torch.allclose(extractor(images), before)

    def test_parameters_are_the_models_own_each_once(self, taps):
        model = build_network("resnet18_cifar", num_classes=10, channels=3, input_size=32)
        extractor = MultiScaleExtractor(model, taps, input_shape=(3, 32, 32))
        assert {id(p) for p in extractor.parameters()} == {id(p) for p in model.parameters()}
        assert len(list(extractor.parameters())) == len(list(model.parameters()))

    def test_every_module_keeps_its_mode(self, taps):
        model = build_network("resnet18_cifar", num_classes=10, channels=3, input_size=32).train()
        model.bn1.eval()
        model.layer2.requires_grad_(False).eval()
        modes = {name: module.training for name, module in model.named_modules()}
        statistics = model.layer1[0].bn1.running_mean.clone()
        extractor = MultiScaleExtractor(model, taps, input_shape=(3, 32, 32))
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.equal(model.layer1[0].bn1.running_mean, statistics)
        assert extractor.training
        extractor = MultiScaleExtractor(model.eval(), taps, input_shape=(3, 32, 32))
        assert not any(module.training for module in extractor.modules())

    def test_train_mode_is_the_models(self, taps):
        model = build_network("resnet18_cifar", num_classes=10, channels=3, input_size=32).eval()
        extractor = MultiScaleExtractor(model, taps, input_shape=(3, 32, 32))
        images = torch.rand(4, 3, 32, 32)
        extractor.train()
        before = model.bn1.running_mean.clone()
        training = extractor(images)
        assert not torch.equal(model.bn1.running_mean, before)
        extractor.eval()
        assert not torch.allclose(extractor(images), training)


def test_no_hooks_stay_on_the_model_even_after_an_error():
    model = build_network("lenet5", num_classes=10, channels=1, input_size=28)
    extractor = MultiScaleExtractor(model)
    with pytest.raises(RuntimeError):
        extractor(torch.zeros(1, 1, 99, 99))
    assert not any(module._forward_hooks for module in model.modules())


class Untraceable(nn.Module):
    """Branches on the data, which torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.out = nn.Linear(8, 5)

    def forward(self, images):
        maps = self.stage1(images)
        if maps.sum() > 0:
            maps = maps + 1
        return self.out(self.stage2(maps).mean((2, 3)))


def test_data_dependent_control_flow():
    model = Untraceable()
    extractor = MultiScaleExtractor(model)
    assert (extractor.taps, extractor.channels) == (("stage1", "stage2"), 12)
    images = torch.rand(2, 3, 32, 32)
    found, logits = extractor.features_and_logits(images)
    maps = model.stage1(images)
    torch.testing.assert_close(found[:, :4], maps.mean((2, 3)))
    torch.testing.assert_close(found[:, 4:], model.stage2(maps + 1).mean((2, 3)))
    assert torch.equal(logits, model(images))
    with pytest.raises(ValueError, match=r"teacher\.taps: .* no node 'add' \(torch\.fx cannot trace"):
        MultiScaleExtractor(model, ["add"])


class Bottleneck(nn.Module):
    """Like MobileNet's: an inner convolution still has the resolution of the block before."""

    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, 1),
            nn.ReLU(),
            nn.Conv2d(3 * channels, out_channels, 3, stride, padding=1),
        )

    def forward(self, maps):
        return F.relu(self.conv(maps))


class Trunk(nn.Module):
    """Several stages in one module that itself gives a map."""

    def __init__(self):
        super().__init__()
        widths = (3, 4, 5, 6, 7, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(Bottleneck(i, o, 2), Bottleneck(o, o, 1)) for i, o in pairwise(widths)
        )

    def forward(self, maps):
        for block in self.blocks:
            maps = block(maps)
        return maps


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout2d()
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images):
        return self.head(self.drop(self.pool(self.trunk(images)))).flatten(1)


def test_by_resolution_takes_whole_blocks_of_the_last_four_sizes():
    extractor = MultiScaleExtractor(Wrapped(), input_shape=(3, 64, 64))
    assert extractor.taps == tuple(f"trunk.blocks.{index}" for index in (1, 2, 3, 4))
    assert extractor.channels == 5 + 6 + 7 + 8


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.out = nn.Linear(8, 5)

    def forward(self, images):
        return self.out(self.relu(self.conv2(self.relu(self.conv1(images)))).mean((2, 3)))


def test_a_module_that_runs_again_counts_with_its_last_output():
    model = SharedActivation()
    extractor = MultiScaleExtractor(model, input_shape=(3, 32, 32))
    assert extractor.taps == ("conv1", "relu")
    images = torch.rand(2, 3, 32, 32)
    first = model.conv1(images)
    second = model.conv2(first.relu()).relu()
    torch.testing.assert_close(extractor(images), torch.cat([first.mean((2, 3)), second.mean((2, 3))], dim=1))


def test_a_module_may_be_tapped_by_any_of_its_names():
    model = SharedActivation()
    model.alias = model.relu
    assert MultiScaleExtractor(model, ["alias"], input_shape=(3, 32, 32)).channels == 8


def test_a_patch_convolution_is_a_block_of_its_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    assert MultiScaleExtractor(model, input_shape=(3, 32, 32)).taps == ("0",)


class Patches(nn.Module):
    """A transformer that no table knows."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 8, stride=8)
        self.layers = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, images):
        return self.out(self.layers(self.cut(images).flatten(2).mT).mean(1))


def test_unknown_transformer_needs_taps():
    with pytest.raises(ValueError, match=r"teacher\.taps: none known for Patches"):
        MultiScaleExtractor(Patches())
    assert MultiScaleExtractor(Patches(), ["layers"]).channels == 8


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["layer1", "layer5"], r"teacher\.taps: ResNet has no node 'layer5'.*; it has .*layer4"),
        (["layer4.1.add_9"], r"teacher\.taps: ResNet has no node 'layer4.1.add_9'.*layer4.1.add"),
        ("layer1", r"teacher\.taps: ResNet has no node 'l'"),
        ([], r"teacher\.taps: must name at least one node"),
        (["layer1", "layer1"], r"teacher\.taps: must name .* each once"),
    ],
)
def test_wrong_taps(taps, message):
    model = build_network("resnet18", num_classes=5, channels=3, input_size=64)
    with pytest.raises(ValueError, match=message):
        MultiScaleExtractor(model, taps, input_shape=(3, 64, 64))


def test_taps_without_a_usable_output():
    model = nn.ModuleDict({"a": Patches(), "idle": nn.Linear(2, 2)})
    model.forward = lambda images: model["a"](images)
    with pytest.raises(ValueError, match=r"teacher\.taps: idle gives no tensor"):
        MultiScaleExtractor(model, ["idle"])
    model = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (2, 3)), nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    with pytest.raises(ValueError, match=r"teacher\.taps: 0 gives \[6, 32, 32\], not \[B, C\]"):
        MultiScaleExtractor(model, ["0"], input_shape=(3, 32, 32))


def test_input_shape_by_default():
    for size in (28, 32, 48):  # LeNet says its size, others are tried
        model = build_network("lenet5", num_classes=5, channels=1, input_size=size)
        assert MultiScaleExtractor(model).channels == 226
    fixed = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 32 * 32, 5))
    assert MultiScaleExtractor(fixed).taps == ("1",)


def test_images_that_do_not_fit():
    model = build_network("lenet5", num_classes=5, channels=1, input_size=28)
    with pytest.raises(ValueError, match=r"LeNet5 takes no images of shape \[\(3, 28, 28\)\]: RuntimeError"):
        MultiScaleExtractor(model, input_shape=(3, 28, 28))


def test_square_images_only():
    with pytest.raises(ValueError, match=r"square images, not \(3, 64, 32\)"):
        MultiScaleExtractor(Untraceable(), input_shape=(3, 64, 32))


def test_a_model_that_gives_no_logits():
    model = nn.Conv2d(3, 4, 1)
    model.forward = lambda images: {"logits": images}
    with pytest.raises(ValueError, match="returns dict, not a tensor of logits"):
        MultiScaleExtractor(model)


class DeadCode(nn.Module):
    """What torch.fx sees last is not what the model returns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, 5)

    def forward(self, images):
        maps = self.conv(images) + 1
        logits = self.out(maps.mean((2, 3)))
        _unused = maps.sum()
        return logits


def test_operations_of_a_model_whose_logits_cannot_be_told():
    with pytest.raises(ValueError, match=r"teacher\.taps: torch\.fx traces DeadCode wrongly"):
        MultiScaleExtractor(DeadCode(), ["add"])


def test_a_grid_pools_cells_and_one_cell_is_the_mean() -> None:
    network = build_network("resnet20_cifar", num_classes=4, channels=3, input_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    whole, cells = MultiScaleExtractor(network), MultiScaleExtractor(network, grid=2)
    assert (whole.channels, cells.channels) == (112, 448)
    assert (whole.last_tap, cells.last_tap) == ((64, 1), (64, 4))
    pooled = cells(images)
    # Maps of even sides: the mean over the cells is the mean over the map.
    means = [part.reshape(2, -1, 4).mean(2) for part in pooled.split([64, 128, 256], dim=1)]
    torch.testing.assert_close(torch.cat(means, 1), whole(images))
    with torch.no_grad():
        layer1 = network.get_submodule("layer1")
        kept = {}
        handle = layer1.register_forward_hook(lambda _, __, output: kept.update(map=output))
        network(images)
        handle.remove()
    torch.testing.assert_close(pooled[:, 0], kept["map"][:, 0, :16, :16].mean((1, 2)))
    torch.testing.assert_close(pooled[:, 3], kept["map"][:, 0, 16:, 16:].mean((1, 2)))


def test_maps_smaller_than_the_grid_and_vectors_are_pooled_as_a_whole() -> None:
    network = build_network("lenet5", num_classes=4, channels=1, input_size=28).eval()
    assert MultiScaleExtractor(network, grid=2).channels == 4 * (6 + 16) + 120 + 84
    assert MultiScaleExtractor(network, grid=2).last_tap == (84, 1)
    assert MultiScaleExtractor(network, grid=6).channels == 36 * 6 + 16 + 120 + 84  # pool2 is 5 x 5
    with pytest.raises(ValueError, match="grid must be at least 1"):
        MultiScaleExtractor(network, grid=0)
