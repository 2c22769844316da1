"""Milliseconds to decode a photograph-like JPEG on one core, and the vCPUs that keep a GPU busy."""

import argparse
import io
import platform
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pukd_ray.cli import at_least, parse_flags
from pukd_ray.corpus.pixels import PixelSpec, decode

# Images per second of ResNet-50 at 224 px, FP32, batch 128, on NVIDIA T4: NVIDIA DeepLearningExamples,
# PyTorch/Classification/ConvNets/resnet50v1.5. L4: at most 4.4 times a T4 (DEEP-GAP, arXiv 2604.14552).
T4_RESNET50 = 426.0
L4_OVER_T4 = 4.4
# Multiply-adds of ResNet-50 at 224 px over those of the CIFAR ResNet-34 at 32 px.
CIFAR_SPEEDUP = 4.1 / 1.16


def photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """JPEG of noise whose amplitude falls as 1 / frequency, as in photographs, at about their size in bytes."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    shared, own = rng.standard_normal((height, width)), rng.standard_normal((3, height, width))
    field = np.fft.ifft2(np.fft.fft2(shared + 0.3 * own) / frequency).real
    pixels = np.clip(128 + 55 * field / field.std(axis=(1, 2), keepdims=True), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(sink, "JPEG", quality=75)
    return sink.getvalue()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("--images", type=at_least(1), default=100, help="[%(default)s]")
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="the fastest counts: others share the core [%(default)s]"
    )


def main(argv: Sequence[str]) -> None:
    """Measure, print."""
    arguments = parse_flags(argv, __doc__, "pukd measure-decoding", add_flags)
    rng = np.random.default_rng(0)
    images = [photograph(rng) for _ in range(arguments.images)]
    kilobytes = np.mean([len(image) for image in images]) / 1024
    print(f"{platform.platform()}, Pillow, one thread; JPEG of 500 x 375, {kilobytes:.0f} KiB on average")
    for size, speedup in ((32, CIFAR_SPEEDUP), (224, 1.0)):
        spec, seconds = PixelSpec(size, 3, "crop"), []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            for image in images:
                decode(image, spec)
            seconds.append(time.perf_counter() - start)
        each = min(seconds) / len(images)
        slow, fast = (T4_RESNET50 * speedup * factor for factor in (1.0, L4_OVER_T4))
        print(
            f"{size:>3} px: {1e3 * each:.2f} ms an image; {slow:,.0f} (T4) to {fast:,.0f} (L4) images/s of a GPU take "
            f"{slow * each:.1f} to {fast * each:.1f} cores, twice as many vCPUs"
        )
