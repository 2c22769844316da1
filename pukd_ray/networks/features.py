"""Multi-scale features of a classifier: the pooled outputs of a few of its stages, side by side."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def _named(prefix: str, *suffixes: object) -> tuple[str, ...]:
    return tuple(f"{prefix}{suffix}" for suffix in suffixes)


# Class name -> tap sets; the first whose modules all ran counts: timm shares class names with torchvision.
_TABLE: dict[str, tuple[tuple[str, ...], ...]] = {
    "LeNet5": (("pool1", "pool2", "relu3", "relu4"),),
    "CifarResNet": (_named("layer", 1, 2, 3),),
    "ResNet": (_named("layer", 1, 2, 3, 4),),
    "RegNet": (_named("trunk_output.block", 1, 2, 3, 4),),
    "DenseNet": (_named("features.denseblock", 1, 2, 3, 4),),
    "MobileNetV2": (_named("features.", 3, 6, 13, 18),),
    "MobileNetV3": (_named("features.", 3, 6, 12, 16), _named("features.", 1, 3, 8, 12)),  # large, small
    "EfficientNet": (_named("features.", 2, 3, 5, 8), _named("features.", 2, 3, 5, 7)),  # the latter: v2_s
    "ShuffleNetV2": (("stage2", "stage3", "stage4", "conv5"),),
    "ConvNeXt": (_named("features.", 1, 3, 5, 7),),
    "SwinTransformer": (_named("features.", 1, 3, 5, 7),),
}
_CLASSIFIERS = ("classifier", "fc", "head")  # what torchvision and timm call the part after the trunk
_PASSIVE = (
    nn.Identity,
    *(getattr(nn, name) for name in nn.modules.pooling.__all__ + nn.modules.dropout.__all__),
)
_SCALES = 4
_DUMMY_BATCH = 2  # not 1, by which a tap that has lost its batch axis would pass


class MultiScaleExtractor(nn.Module):
    """Pooled outputs of several stages of a classifier, concatenated.

    Images [B, channels, H, W] float -> features [B, C] float. Each tap is pooled by rank: maps over their pixels
    (in each cell of a `grid`, if asked for), tokens [B, N, C] over those that stand for a part of the image, so
    without class tokens; 2-D outputs stay as they are. A tap that the network runs several times counts with its
    last output.

    The network is used, not copied: training it changes the features, `model.state_dict()` keeps its names.
    The mode is the model's; call `train()` or `eval()` on the extractor to change it. Gradients flow unless
    the caller forbids them, but the classifier gets none from the features.

    Args:
        model: the classifier.
        taps: names of modules (`layer3`), or of operations as torchvision's `get_graph_node_names` lists them
            (`encoder.layers.encoder_layer_3.add_1`) if torch.fx can trace the network. By default those of a
            table; for a network that is not in it, `feature_info` of a timm model, else the last block at
            each of the last four resolutions.
        input_shape: (channels, H, W) of the images, H = W. One forward of zeros of this shape finds the taps
            and their widths. By default the channels of the first convolution, and the model's `image_size`
            or else the first of 224, 64, 32 and 28 pixels that it takes.
        grid: maps are pooled in grid x grid cells, which keeps something of where things are (spatial pyramid
            pooling, He et al. 2014); a map with fewer pixels to a side is pooled as a whole.

    Attributes:
        taps: tuple[str, ...], in the order of the features.
        channels: int, the total width C.
        last_tap: (channels, grid cells) of the last tap: the last of the features, all cells of a channel together.

    Raises ValueError if the network does not take such images and, naming the config key `teacher.taps`, if
    a tap does not exist or has no usable output, or if none can be found.

    Examples:
        >>> import torch
        >>> from pukd_ray import MultiScaleExtractor
        >>> from pukd_ray.networks.zoo import build_network
        >>> teacher = build_network("resnet20_cifar", num_classes=10, channels=3, input_size=32)
        >>> extractor = MultiScaleExtractor(teacher, input_shape=(3, 32, 32))
        >>> extractor.taps, extractor.channels
        (('layer1', 'layer2', 'layer3'), 112)
        >>> extractor(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 112])
        >>> MultiScaleExtractor(teacher, ["layer3"], input_shape=(3, 32, 32), grid=2).channels
        256
    """

    taps: tuple[str, ...]
    channels: int
    last_tap: tuple[int, int]

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str] | None = None,
        *,
        input_shape: tuple[int, int, int] | None = None,
        grid: int = 1,
    ) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"grid must be at least 1, not {grid}")
        if input_shape is not None and input_shape[1] != input_shape[2]:
            raise ValueError(f"input_shape must be that of square images, not {input_shape}")
        self.model = model
        self.training = model.training
        self._graph: nn.Module | None = None  # computes taps that are operations, not modules
        with _eval_mode(model), torch.no_grad():
            images, logits, calls = _dummy_forward(model, input_shape)
            self.taps = _default_taps(model, calls) if taps is None else tuple(taps)
            if not self.taps or len(set(self.taps)) < len(self.taps):
                raise ValueError(f"teacher.taps: must name at least one node, each once, not {list(self.taps)}")
            if set(self.taps) <= _modules(model).keys():
                shapes = {tap: _usable(tap, calls[tap].output if tap in calls else None) for tap in self.taps}
            else:
                self._graph, self._logits_node = _traced(model, self.taps)
                outputs = self._graph(images)
                self._graph.train(self.training)
                if not _close(outputs[self._logits_node], logits):
                    raise ValueError(f"teacher.taps: torch.fx traces {type(model).__name__} wrongly; name modules only")
                shapes = {tap: _usable(tap, _shape(outputs[tap])) for tap in self.taps}
        self._channel_axis = _channel_axes(shapes)
        self._prefix_tokens = _prefix_tokens(model)
        self._grids = {tap: _grid_of(shape, self._channel_axis[tap], grid) for tap, shape in shapes.items()}
        self.channels = sum(shape[self._channel_axis[tap]] * self._grids[tap] ** 2 for tap, shape in shapes.items())
        last = self.taps[-1]
        self.last_tap = (shapes[last][self._channel_axis[last]], self._grids[last] ** 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] float -> features [B, C]."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, channels, H, W] float -> features [B, C] and logits [B, K], from one forward."""
        if self._graph is not None:
            outputs = self._graph(images)
            pooled = {tap: self._pool(tap, outputs[tap]) for tap in self.taps}
            logits = outputs[self._logits_node]
        else:
            pooled = {}

            # Pooled at once: the maps need not be kept, and a later in-place ReLU cannot change them.
            def pool(tap: str, _inputs: tuple[Any, ...], output: Tensor) -> None:
                pooled[tap] = self._pool(tap, output)

            with _observed({tap: self.model.get_submodule(tap) for tap in self.taps}, pool):
                logits = self.model(images)
        return torch.cat([pooled[tap] for tap in self.taps], dim=1), logits

    def _pool(self, tap: str, output: Tensor) -> Tensor:
        if output.ndim > 2 and output.itemsize < 4:  # under autocast: a mean keeps digits that its terms lack
            output = output.float()
        if output.ndim == 4:
            if self._grids[tap] > 1:
                maps = output if self._channel_axis[tap] == 1 else output.permute(0, 3, 1, 2)
                return nn.functional.adaptive_avg_pool2d(maps, self._grids[tap]).flatten(1)
            return output.mean(dim=(2, 3) if self._channel_axis[tap] == 1 else (1, 2))
        if output.ndim == 3:
            return output[:, self._prefix_tokens :].mean(dim=1)
        return output


class _Call(NamedTuple):
    """Shapes of a module's first argument and output in the dummy forward, None for what is no tensor."""

    input: torch.Size | None
    output: torch.Size | None


def _dummy_forward(
    model: nn.Module, input_shape: tuple[int, int, int] | None
) -> tuple[Tensor, Tensor, dict[str, _Call]]:
    """Run the model on zeros; return images, logits and each module's last call, in order of completion."""
    calls: dict[str, _Call] = {}

    def record(name: str, inputs: tuple[Any, ...], output: object) -> None:
        calls.pop(name, None)  # moves a module that runs again to the end
        calls[name] = _Call(_shape(inputs[0]) if inputs else None, _shape(output))

    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    fault: Exception | None = None
    shapes = [input_shape] if input_shape is not None else _likely_input_shapes(model)
    for shape in shapes:
        calls.clear()
        images = weight.new_zeros(_DUMMY_BATCH, *shape)
        try:
            with _observed(_modules(model), record):
                logits = model(images)
        except Exception as error:  # anything, in a network that does not fit the images
            fault = error
            continue
        if not isinstance(logits, Tensor):
            raise ValueError(f"{type(model).__name__} returns {type(logits).__name__}, not a tensor of logits")
        return images, logits, calls
    raise ValueError(f"{type(model).__name__} takes no images of shape {shapes}: {fault!r}") from fault


def _likely_input_shapes(model: nn.Module) -> list[tuple[int, int, int]]:
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    own = getattr(model, "image_size", None)
    return [(channels, size, size) for size in ((own,) if isinstance(own, int) else (224, 64, 32, 28))]


def _default_taps(model: nn.Module, calls: Mapping[str, _Call]) -> tuple[str, ...]:
    """Taps from the table, else from timm's own list, else by resolution."""
    for cls in type(model).__mro__:
        for taps in _TABLE.get(cls.__name__, ()):
            if calls.keys() >= set(taps):
                return taps
    if "encoder.layers" in calls:  # torchvision's ViT
        return _quarters([name for name in calls if name.startswith("encoder.layers.") and name.count(".") == 2])
    stages = [stage["module"] for stage in getattr(model, "feature_info", ())]
    if stages and calls.keys() >= set(stages):
        return _quarters(stages)
    return _taps_by_resolution(model, calls)


def _quarters(names: Sequence[str]) -> tuple[str, ...]:
    """Take the names at 1/4, 2/4, 3/4 and 4/4 of the depth; of five stages, all but the first."""
    picks = {math.ceil(len(names) * quarter / _SCALES) - 1 for quarter in range(1, _SCALES + 1)}
    return tuple(names[pick] for pick in sorted(picks))


def _taps_by_resolution(model: nn.Module, calls: Mapping[str, _Call]) -> tuple[str, ...]:
    """The last block at each of the last resolutions.

    Blocks, not whatever ran last: that may be a convolution inside the next block, before its stride.
    """
    blocks = set(_blocks(model, calls))
    last: dict[torch.Size, str] = {}
    for name, call in calls.items():
        if name in blocks and call.output is not None:
            last[call.output[2:]] = name
    # A trunk of tokens has one block, the convolution that cuts the patches: no feature worth the name.
    tokens = any(
        call.output is not None and len(call.output) > 2 and not _is_map(call.output) for call in calls.values()
    )
    if not last or (len(last) == 1 and tokens):
        raise ValueError(f"teacher.taps: none known for {type(model).__name__}; name some of its modules")
    return tuple(last.values())[-_SCALES:]


def _blocks(module: nn.Module, calls: Mapping[str, _Call], prefix: str = "") -> Iterator[str]:
    """Names of the largest parts of the trunk that give maps [B, C, H, W] and are no series of stages."""
    for child_name, child in module.named_children():
        if child_name in _CLASSIFIERS:
            continue
        name = prefix + child_name
        call = calls.get(name, _Call(None, None))
        if _is_map(call.output) and not (any(child.children()) and _spans_stages(call)):
            if not isinstance(child, _PASSIVE):
                yield name
        else:
            yield from _blocks(child, calls, name + ".")


def _spans_stages(call: _Call) -> bool:
    """Whether a module shrinks its maps by more than one stride of 2 can, which may also cost the border."""
    if call.input is None or call.output is None or len(call.input) != 4:
        return False
    return call.input[-1] > 2 * call.output[-1] + 2


def _is_map(shape: torch.Size | None) -> bool:
    """Whether this is [B, C, H, W] for square images, and not [B, H, W, C] as in Swin."""
    return shape is not None and len(shape) == 4 and shape[2] == shape[3]


def _usable(tap: str, shape: torch.Size | None) -> torch.Size:
    if shape is None or len(shape) not in (2, 3, 4) or shape[0] != _DUMMY_BATCH:
        found = "no tensor" if shape is None else list(shape)
        raise ValueError(f"teacher.taps: {tap} gives {found}, not [B, C], [B, N, C] or [B, C, H, W]")
    return shape


def _channel_axes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Axis of the channels of [B, C], [B, N, C], and [B, C, H, W] or [B, H, W, C] for square images."""
    last = any(len(shape) == 4 and not _is_map(shape) for shape in shapes.values())

    def axis(shape: torch.Size) -> int:
        if len(shape) != 4:
            return len(shape) - 1
        if shape[1] == shape[2] == shape[3]:  # the layout of the other taps decides
            return 3 if last else 1
        return 1 if _is_map(shape) else 3

    return {tap: axis(shape) for tap, shape in shapes.items()}


def _grid_of(shape: torch.Size, channel_axis: int, grid: int) -> int:
    """Cells to a side in which a tap of this shape is pooled."""
    if len(shape) != 4:
        return 1
    sides = shape[2:] if channel_axis == 1 else shape[1:3]
    return grid if min(sides) >= grid else 1


def _prefix_tokens(model: nn.Module) -> int:
    """How many tokens come before those of the patches, by the names of timm and torchvision."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return getattr(model, "num_prefix_tokens", int(bool(names & {"class_token", "cls_token"})))


def _traced(model: nn.Module, taps: Sequence[str]) -> tuple[nn.Module, str]:
    """Trace a model whose taps are not all modules; return what computes them, and the node of the logits."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    modules = _modules(model)
    try:
        nodes = get_graph_node_names(model, suppress_diff_warning=True)[1]
    except Exception as error:  # tracing runs the model's own code on proxies
        nodes, fault = [], f" (torch.fx cannot trace its operations: {error!r})"
    else:
        fault = ""
    for tap in taps:
        if tap not in modules and tap not in nodes:
            close = difflib.get_close_matches(tap, [*modules, *nodes], n=5, cutoff=0.0)
            raise ValueError(
                f"teacher.taps: {type(model).__name__} has no node {tap!r}{fault}; it has {', '.join(close)}"
            )
    graph = create_feature_extractor(model, list(dict.fromkeys([*taps, nodes[-1]])), suppress_diff_warning=True)
    return graph, nodes[-1]


def _close(traced: Tensor, logits: Tensor) -> bool:
    """Whether these are the same up to what a GPU's choice of kernels changes."""
    return traced.shape == logits.shape and torch.allclose(traced, logits, rtol=1e-3, atol=1e-3)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@contextmanager
def _observed(modules: Mapping[str, nn.Module], observe: Callable[[str, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call `observe(name, inputs, output)` after each forward of a module; leave no hooks behind."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: observe(name, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module gets its own mode back, frozen BatchNorms included."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
