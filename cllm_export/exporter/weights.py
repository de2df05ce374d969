"""Stream weights from a checkpoint into the bundle's one weights file, tensor by tensor.

A weight is read through a memory map, checked, cast, stacked and transposed as its ``WeightSource`` says, written,
and forgotten. Every graph of a bundle refers to the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle import WEIGHTS_NAME, Progress
from cllm_export.errors import CheckpointError, GraphError
from cllm_export.exporter.checkpoint import Checkpoint
from cllm_export.exporter.graph import DecoderGraph, WeightSource
from cllm_export.exporter.trace import TORCH_DTYPE

ALIGNMENT = 4096
"""Bytes a weight is aligned to: a page, so that engines can map it."""

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
IR_DTYPE = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int64: ir.DataType.INT64,
}


def write_weights(
    graph: DecoderGraph, checkpoint: Checkpoint, directory: Path, progress: Progress | None = None
) -> dict[str, ir.ExternalTensor]:
    """Write every weight and constant of the graph to ``weights.bin``; where each one lies, by name.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, is not floating point, or overflows the precision.
    """
    _check_dtypes(graph, checkpoint)
    written: dict[str, ir.ExternalTensor] = {}
    names = [*sorted(graph.weights), *sorted(graph.constants)]
    with (directory / WEIGHTS_NAME).open("wb") as file:
        for done, name in enumerate(names, start=1):
            tensor = graph.constants.get(name)
            if tensor is None:
                tensor = _assemble(graph.weights[name], checkpoint, TORCH_DTYPE[graph.precision])
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            file.write(tensor.contiguous().numpy().data)
            written[name] = _external(name, tensor, offset, directory)
            if progress:
                progress("weights", done, len(names))
    return written


def attach_weights(graph: DecoderGraph, written: dict[str, ir.ExternalTensor]) -> None:
    """Turn the graph's weight inputs into initializers that point into the weights file."""
    stored = set(graph.weights) | set(graph.constants)
    for value in [value for value in graph.graph.inputs if value.name in stored]:
        tensor = written[str(value.name)]
        if value.shape is not None and tuple(value.shape.dims) != tuple(tensor.shape.dims):
            raise GraphError(f"weight {value.name} was written as {tensor.shape}, the graph expects {value.shape}")
        graph.graph.inputs.remove(value)
        value.const_value = tensor
        value.shape, value.type = ir.Shape(tensor.shape.dims), ir.TensorType(tensor.dtype)
        graph.graph.register_initializer(value)


def _assemble(source: WeightSource, checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
    parts = [_read_checked(name, checkpoint, dtype) for name in source.tensors]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if source.offset:
        tensor = tensor.float().add(source.offset).to(dtype)
    return tensor.t() if source.transposed else tensor


def _read_checked(name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
    tensor = checkpoint.read(name)
    _require_finite(tensor, name, "is damaged or the training diverged: restore an earlier checkpoint")
    cast = tensor.to(dtype)
    _require_finite(cast, name, f"holds values that do not fit {dtype}: build with --precision fp32")
    return cast


def _require_finite(tensor: Tensor, name: str, meaning: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = int((~finite).sum())
        raise CheckpointError(f"tensor {name} has {bad} of {tensor.numel()} values NaN or infinite: it {meaning}")


def _check_dtypes(graph: DecoderGraph, checkpoint: Checkpoint) -> None:
    for source in graph.weights.values():
        for name in source.tensors:
            dtype = checkpoint.tensors[name].dtype
            if dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"tensor {name} has dtype {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")


def _external(name: str, tensor: Tensor, offset: int, directory: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        WEIGHTS_NAME,
        offset,
        tensor.numel() * tensor.element_size(),
        IR_DTYPE[tensor.dtype],
        shape=ir.Shape(tensor.shape),
        name=name,
        base_dir=directory,
    )
