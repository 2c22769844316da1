"""Networks for small images that torchvision lacks: LeNet-5 and the CIFAR variants of ResNet.

torchvision is imported where it is used: that takes seconds, and a LeNet does not need it.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn


class LeNet5(nn.Sequential):
    """LeNet-5 with ReLU and max-pooling instead of tanh and average pooling.

    Images [B, channels, input_size, input_size] float -> logits [B, num_classes]. Images below 32 pixels are
    padded by 2 on each side, as the original does with the 28-pixel digits of MNIST.

    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        input_size: int,
        widths: tuple[int, int, int, int] = (6, 16, 120, 84),
    ) -> None:
        if input_size < 12:
            raise ValueError(f"LeNet-5 needs images of at least 12 pixels, not {input_size}")
        padding = 2 if input_size < 32 else 0
        map_size = ((input_size + 2 * padding - 4) // 2 - 4) // 2
        conv1, conv2, hidden1, hidden2 = widths
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, conv1, 5, padding=padding),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(conv1, conv2, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(conv2 * map_size**2, hidden1),
                relu3=nn.ReLU(),
                fc2=nn.Linear(hidden1, hidden2),
                relu4=nn.ReLU(),
                fc3=nn.Linear(hidden2, num_classes),
            )
        )
        self.image_size: int = input_size  # the one size that fc1 fits; torchvision's ViT calls it the same


def lenet5(*, num_classes: int, channels: int, input_size: int) -> LeNet5:
    """LeNet-5: 61,706 parameters for 10 classes of gray 28- or 32-pixel images."""
    return LeNet5(num_classes=num_classes, channels=channels, input_size=input_size)


def lenet5_half(*, num_classes: int, channels: int, input_size: int) -> LeNet5:
    """LeNet-5 with half the channels in every layer: 15,738 parameters for the same images."""
    return LeNet5(num_classes=num_classes, channels=channels, input_size=input_size, widths=(3, 8, 60, 42))


class ShortcutA(nn.Module):
    """Option A of He et al. 2016, without parameters: every `stride`-th pixel, new channels of zeros on both sides.

    [B, C, H, W] -> [B, C + `new_channels`, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (0, 0, 0, 0, new_channels // 2, new_channels - new_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class CifarResNet(nn.Sequential):
    """Three-stage ResNet for 32-pixel images, of 6 * `blocks` + 2 layers.

    Images [B, channels, H, W] float -> logits [B, num_classes]. Where a stage changes the width, the `shortcut` is
    either that of option A of the paper, its choice for CIFAR-10, or B, a 1x1 convolution. Parameters are named as in
    torchvision's ResNet.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
    """

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int,
        channels: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        shortcut: Literal["A", "B"] = "A",
    ) -> None:
        from torchvision.models.resnet import BasicBlock

        def reshaped(in_channels: int, out_channels: int, stride: int) -> nn.Module:
            if shortcut == "A":
                return ShortcutA(stride, out_channels - in_channels)
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            changes = stride != 1 or in_channels != out_channels
            first = BasicBlock(
                in_channels, out_channels, stride, reshaped(in_channels, out_channels, stride) if changes else None
            )
            return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))

        stages = (stage(*io, stride) for io, stride in zip(pairwise((widths[0], *widths)), (1, 2, 2), strict=True))
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
                bn1=nn.BatchNorm2d(widths[0]),
                relu=nn.ReLU(inplace=True),
                **{f"layer{index}": layers for index, layers in enumerate(stages, start=1)},
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(widths[-1], num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def cifar_resnet(
    depth: int, shortcut: Literal["A", "B"], *, num_classes: int, channels: int, input_size: int
) -> CifarResNet:
    """The CIFAR ResNet of `depth` = 6 n + 2 layers; of 20: 269,722 parameters (B: 272,474) for 10 classes, RGB."""
    del input_size  # the pooling before the classifier takes any
    return CifarResNet((depth - 2) // 6, num_classes=num_classes, channels=channels, shortcut=shortcut)


_SHORTCUTS: dict[str, Literal["A", "B"]] = {"": "A", "_b": "B"}
CIFAR_RESNETS = {
    f"resnet{depth}_cifar{suffix}": partial(cifar_resnet, depth, shortcut)
    for depth in (8, 20, 32, 44, 56, 110)
    for suffix, shortcut in _SHORTCUTS.items()
}
"""By name, those with option B of the shortcut as `..._cifar_b`."""


def resnet18_cifar(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images: 11,173,962 parameters for 10 classes, RGB."""
    del input_size  # the pooling before the classifier takes any
    from torchvision.models import resnet18

    return _with_small_stem(resnet18(num_classes=num_classes), channels)


def resnet34_cifar(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
    """torchvision's ResNet-34 with a stem for small images: 21,282,122 parameters for 10 classes, RGB."""
    del input_size  # the pooling before the classifier takes any
    from torchvision.models import resnet34

    return _with_small_stem(resnet34(num_classes=num_classes), channels)


def _with_small_stem(network: nn.Module, channels: int) -> nn.Module:
    """Replace the 7x7 stride-2 convolution and the max-pooling, which leave one pixel of a 32-pixel image."""
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = stem
    network.maxpool = nn.Identity()
    return network
