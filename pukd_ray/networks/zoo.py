"""Networks by name, and weights that must fit them."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pukd_ray.networks import small
from pukd_ray.networks.found import Found, parts_that_fit, row_counts

_SMALL: dict[str, Callable[..., nn.Module]] = {
    "lenet5": small.lenet5,
    "lenet5_half": small.lenet5_half,
    **small.CIFAR_RESNETS,
    "resnet18_cifar": small.resnet18_cifar,
    "resnet34_cifar": small.resnet34_cifar,
}
_NAMED_IN_MESSAGE = 3


def build_network(arch: str, *, num_classes: int, channels: int, input_size: int) -> nn.Module:
    """Build a classifier with random weights: images [B, channels, S, S] float -> logits [B, num_classes].

    `arch` is one of
    - `lenet5`, `lenet5_half`, `resnet18_cifar`, `resnet34_cifar` (torchvision's, with a stem for small images), and
      `resnet20_cifar` with 8, 20, 32, 44, 56 or 110 layers, the shortcut without parameters (option A of He et al.
      2016), or, as `resnet20_cifar_b`, a projection (option B);
    - a classification model of torchvision, e.g. `resnet50`;
    - `timm:NAME`, a model of timm (extra `pukd_ray[timm]`);
    - `package.module:factory`, called as `factory(num_classes=..., channels=..., input_size=...)`.

    Raises ValueError naming `arch` if there is no such network or it cannot be built with these numbers.
    """
    factory = _factory(arch)
    try:
        network = factory(num_classes=num_classes, channels=channels, input_size=input_size)
    except Exception as error:  # constructors raise all kinds, assertions among them
        given = f"num_classes={num_classes}, channels={channels}, input_size={input_size}"
        raise ValueError(f"{arch}: cannot be built with {given}: {error!r}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch}: returned {type(network).__name__}, not a torch.nn.Module")
    return network


def outline_network(arch: str, *, num_classes: int, channels: int, input_size: int) -> nn.Module:
    """As `build_network`, but only names and shapes, for `find_weights`: cheap enough for a driver.

    Wherever the constructor allows it, no parameter is allocated. Raises ValueError like `build_network`.
    """
    numbers = {"num_classes": num_classes, "channels": channels, "input_size": input_size}
    try:
        with torch.device("meta"):
            return build_network(arch, **numbers)
    except ValueError:
        # A constructor that reads a tensor's values needs real ones; a real fault is raised again.
        return build_network(arch, **numbers)


def find_weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> Found:
    """The weights of this network in a checkpoint as training scripts leave them, by `parts_that_fit`.

    Raises ValueError with one line if nothing in it fits, naming missing, unexpected and wrongly shaped entries, or
    if different parts do.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"holds {type(checkpoint).__name__}, not a state_dict")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = parts_that_fit(shapes, checkpoint)
    if not found:
        raise ValueError(_weights_fault(model, shapes, checkpoint))
    first, *others = found
    unlike = [other for other in others if any(not _equal(other.state[k], v) for k, v in first.state.items())]
    if unlike:
        parts = " and ".join(part.taken or "the whole" for part in (first, unlike[0]))
        raise ValueError(f"several parts of it fit {type(model).__name__}: {parts}; save the one that is meant alone")
    return first


def find_start(model: nn.Module, checkpoint: Mapping[str, Any], arch: str, *, channels: int, input_size: int) -> Found:
    """As `find_weights`, what a training of this network, built by these, can begin with: of a checkpoint of other
    classes all but the classifier, that is all whose shape does not go by the number of classes."""
    try:
        return find_weights(model, checkpoint)
    except ValueError:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for others in row_counts(checkpoint):
            try:
                outline = outline_network(arch, num_classes=others, channels=channels, input_size=input_size)
                found = find_weights(outline, checkpoint)
            except ValueError:
                continue
            kept = {name: tensor for name, tensor in found.state.items() if tensor.shape == shapes[name]}
            words = [found.taken] * bool(found.taken) + [f"all but its classifier of {others} classes"]
            return Found(kept, ", ".join(words))
        raise


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], *, what: str) -> str:
    """Load the weights that `find_weights` finds, in place; a model on the meta device takes over the tensors.

    `what` tells the reader which weights these are, e.g. `teacher.weights`. Returns what was taken of the checkpoint,
    empty if it was a plain state_dict. Raises ValueError like `find_weights`; the model is then unchanged.
    """
    try:
        found = find_weights(model, checkpoint)
    except ValueError as fault:
        raise ValueError(f"{what}: {fault}") from None
    put_weights(model, found)
    return found.taken


def put_weights(model: nn.Module, found: Found) -> None:
    """Load what was found, in place; what was not stays as it is."""
    # Names and shapes are those of the network as it is now, so its own versions of the layers hold, which checkpoints
    # often lack; so do the counters of BatchNorm that files older than PyTorch 0.4.1 lack.
    state = model.state_dict()
    counters = {name for name in state.keys() - found.state.keys() if name.endswith("num_batches_tracked")}
    state.update({name: torch.zeros((), dtype=torch.long) for name in counters})
    state.update(found.state)
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in model.parameters()))


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters, trainable or not; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, *, channels: int, input_size: int) -> int:
    """Multiply-adds of one image's forward pass in convolutions, matrix products and attention; sets eval mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, channels, input_size, input_size))
    return int(counter.get_total_flops()) // 2


def _factory(arch: str) -> Callable[..., nn.Module]:
    if arch.startswith("timm:"):
        return _timm_factory(arch)
    if ":" in arch:
        return _imported_factory(arch)
    if arch in _SMALL:
        return _SMALL[arch]
    return _torchvision_factory(arch)


def _imported_factory(arch: str) -> Callable[..., nn.Module]:
    module, _, name = arch.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's module
        raise ValueError(f"{arch}: cannot be imported: {error!r}") from error
    if not callable(factory):
        raise ValueError(f"{arch}: {name} is {type(factory).__name__}, not a callable")
    build: Callable[..., nn.Module] = factory
    return build


def _timm_factory(arch: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{arch}: timm is not installed: pip install 'pukd_ray[timm]'") from error
    name = arch.removeprefix("timm:")
    if not timm.is_model(name):
        raise _unknown(arch, [f"timm:{known}" for known in timm.list_models()])
    fixed_size = (config := timm.get_pretrained_cfg(name)) is not None and config.fixed_input_size

    def build(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
        size: dict[str, Any] = {"img_size": input_size} if fixed_size else {}
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, **size)

    return build


def _torchvision_factory(arch: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models(module=models)
    if arch not in known:
        raise _unknown(arch, [*_SMALL, *known])

    def build(*, num_classes: int, channels: int, input_size: int) -> nn.Module:
        options: dict[str, Any] = {}
        if arch.startswith("vit_"):
            options["image_size"] = input_size
        elif arch.startswith("maxvit_"):
            options["input_size"] = (input_size, input_size)
        elif arch in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True}  # their own default; None warns
        network: nn.Module = models.get_model(arch, weights=None, num_classes=num_classes, **options)
        if channels != 3:
            _narrow_stem(network, channels)
        return network

    return build


def _narrow_stem(network: nn.Module, channels: int) -> None:
    """Give the first convolution another number of input channels.

    Summed kernels keep the model's own initialisation: a gray image gives what its RGB copy would.
    """
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    kernel = stem.weight.detach().sum(dim=1, keepdim=True) / channels
    stem.weight = nn.Parameter(kernel.repeat(1, channels, 1, 1))
    stem.in_channels = channels


def _unknown(arch: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(arch, known, n=_NAMED_IN_MESSAGE, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return ValueError(f"{arch}: no such network{hint}")


def _weights_fault(model: nn.Module, expected: Mapping[str, list[int]], checkpoint: Mapping[str, Any]) -> str:
    """One line on what keeps the nearest part of this checkpoint from fitting this model."""
    state_dict = checkpoint
    for _ in range(2):  # the part that a reader would look into
        inner = [v for v in state_dict.values() if isinstance(v, Mapping) and any(map(torch.is_tensor, v.values()))]
        if len(inner) == 1 and not any(map(torch.is_tensor, state_dict.values())):
            (state_dict,) = inner
    state_dict = {name: value for name, value in state_dict.items() if isinstance(name, str)}
    if state_dict and all(name.startswith("module.") and name not in expected for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    found = {
        name: list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        for name, value in state_dict.items()
    }
    # Files older than PyTorch 0.4.1 lack the batch counters; BatchNorm fills them in by itself.
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    parts = [
        f"{title} {_first_few(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape:", misshaped))
        if names
    ]
    return f"does not fit {type(model).__name__}: {'; '.join(parts)}"


def _equal(one: Tensor, other: Tensor) -> bool:
    """`torch.equal`, which takes no sparse tensors."""
    one, other = (tensor if tensor.layout == torch.strided else tensor.to_dense() for tensor in (one, other))
    return torch.equal(one, other)


def _first_few(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_MESSAGE
    return ", ".join(names[:_NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
