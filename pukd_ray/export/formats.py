"""The formats of stage `export`. One entry adds a format. Nothing here needs Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pukd_ray.config import ExportFormat
from pukd_ray.errors import RunError

PIXELS, PROBABILITIES = "pixels", "probabilities"
"""Names of the input and the output."""
CALIBRATION_BATCH = 16
# Layers that gain by integers, and what stands between them. Not softmax, nor what is done to pixels before the first.
_QUANTISED = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")

Runner = Callable[[np.ndarray], np.ndarray]
"""Pixels [N, C, S, S] of the graph's type -> probabilities float32 [N, K], on one thread of a CPU."""


class Classifier(nn.Module):
    """The whole way from pixels to probabilities: uint8 or float 0 to 255 [N, C, S, S] -> float32 [N, K]."""

    def __init__(self, normalise: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.normalise, self.network = normalise, network

    def forward(self, pixels: Tensor) -> Tensor:
        """As the class says."""
        logits: Tensor = self.network(self.normalise(pixels))
        return logits.softmax(1)


@dataclass(frozen=True)
class Graph:
    """A student as a graph of any number of images at a time, and what the files of all formats are made from."""

    program: ExportedProgram
    calibration: np.ndarray
    """Pixels [M, C, S, S] of the graph's type that int8 ranges are taken from."""
    about: dict[str, str]
    """Goes into the file where the format has a place for it."""


@dataclass(frozen=True)
class Format:
    """One format."""

    file: str
    write: Callable[[Graph], bytes]
    load: Callable[[bytes], Runner]
    exact: bool
    """Whether probabilities must be PyTorch's, but for rounding."""
    runtime: str
    """What runs it."""


def trace(student: nn.Module, example: np.ndarray, calibration: np.ndarray, about: dict[str, str]) -> Graph:
    """The graph of a `Classifier` in eval mode; `example` has two images at least. RunError if torch cannot."""
    batch = Dim("batch", min=1)
    try:
        program = torch.export.export(student, (torch.from_numpy(example),), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # of torch's own many kinds, and of the network's code
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"export: torch.export cannot make a graph of student.arch ({reason}): choose another, or leave export out"
        ) from error
    return Graph(program, calibration, about)


# -- torch ------------------------------------------------------------------------------------------------------


def _write_torch(graph: Graph) -> bytes:
    sink = io.BytesIO()
    torch.export.save(graph.program, sink, extra_files={"about.json": json.dumps(graph.about)})
    return sink.getvalue()


def _load_torch(data: bytes) -> Runner:
    network = torch.export.load(io.BytesIO(data)).module()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = network(torch.from_numpy(pixels)).numpy()
        return probabilities

    return run


# -- ONNX -------------------------------------------------------------------------------------------------------


def _onnx_model(graph: Graph) -> Any:
    program = torch.onnx.export(
        graph.program, dynamo=True, input_names=[PIXELS], output_names=[PROBABILITIES], verbose=False
    )
    assert program is not None
    return program.model_proto


def _with_about(model: Any, about: dict[str, str]) -> bytes:
    import onnx

    onnx.helper.set_model_props(model, about)
    data: bytes = model.SerializeToString()
    return data


def _write_onnx(graph: Graph) -> bytes:
    return _with_about(_onnx_model(graph), graph.about)


def _write_int8(graph: Graph) -> bytes:
    """Static, per channel, signed: what ONNX Runtime's own guide says to try first."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(
                np.array_split(graph.calibration, -(-len(graph.calibration) // CALIBRATION_BATCH))
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {PIXELS: batch}

    with TemporaryDirectory() as place:
        whole, fused, quantised = (str(Path(place, name)) for name in ("whole.onnx", "fused.onnx", "int8.onnx"))
        onnx.save(_onnx_model(graph), whole)
        quant_pre_process(whole, fused, skip_symbolic_shape=True)  # BatchNorm goes into the convolutions
        quantize_static(
            fused,
            quantised,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return _with_about(onnx.load(quantised), graph.about)


def _load_onnx(data: bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(pixels: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = session.run([PROBABILITIES], {PIXELS: pixels})[0]
        return probabilities

    return run


# -- ExecuTorch -------------------------------------------------------------------------------------------------


def _write_executorch(graph: Graph) -> bytes:
    """One image at a time, which is what a device sees, and what its memory is planned for; XNNPACK where it can."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    one = torch.from_numpy(graph.calibration[:1])
    program = torch.export.export(graph.program.module(), (one,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    data: bytes = lowered.to_executorch().buffer
    return data


def _load_executorch(data: bytes) -> Runner:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(data)
    method = program.load_method("forward")

    def run(pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([method.execute([image])[0].numpy() for image in torch.from_numpy(pixels).split(1)])

    return run


FORMATS: dict[ExportFormat, Format] = {
    "onnx": Format("student.onnx", _write_onnx, _load_onnx, True, "ONNX Runtime"),
    "onnx_int8": Format("student.int8.onnx", _write_int8, _load_onnx, False, "ONNX Runtime"),
    "torch": Format("student.pt2", _write_torch, _load_torch, True, "torch.export"),
    "executorch": Format("student.pte", _write_executorch, _load_executorch, True, "ExecuTorch"),
}
