"""The graph in memory while passes work on it: an ONNX model without data, and the source of each weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.quantization import Quantization
from cllm_export.exporter.graph.groups import INT4
from cllm_export.exporter.graph.rotation import ColumnRotation, RowRotation
from cllm_export.exporter.graph.rounding import Part, Rounding

Holds = Literal["values", Part]

IR_DTYPE = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    INT4: ir.DataType.INT4,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}

COMPUTE_DTYPE: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """How one weight of the graph is made from checkpoint tensors.

    They are stacked along their first axis, ``offset`` is added in fp32, and the sum is divided by ``divisor``. The
    result is rotated, rounded if it is quantised, and then transposed.
    """

    tensors: tuple[str, ...]
    transposed: bool = False
    offset: float = 0.0
    """Number to add to the weight, for norms whose scale is 1 + weight."""
    divisor: Tensor | None = None
    """What each row of the sum is divided by. SmoothQuant divides a norm's output channels through the norm's scale."""
    columns: ColumnRotation | None = None
    """Set if the input of the layer is rotated."""
    rows: RowRotation | None = None
    """Set if the output of the layer is rotated."""
    rounding: Rounding | None = None
    holds: Holds = "values"
    """The part of the rounding's result that this weight holds; ``values`` if there is no rounding."""


@dataclass(kw_only=True)
class DecoderGraph:
    """A decoder's ONNX model. Its weights are still graph inputs, and each has a source."""

    model: ir.Model
    precision: Precision
    weights: dict[str, WeightSource] = field(default_factory=dict)
    """Graph input -> how it is made from checkpoint tensors."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Graph input -> value that is not in a checkpoint (RoPE tables, row numbers)."""
    spread: set[ir.Value] = field(default_factory=set)
    """The inputs of linear layers whose channels a rotation mixed, so that none is far above the others. A copy of the
    graph has none."""
    quantization: Quantization | None = None
    """What was quantised; None before quantisation."""

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def copy(self) -> DecoderGraph:
        """A graph that can be changed while this one stays as it is. Both read the same weights."""
        weights, constants = dict(self.weights), dict(self.constants)
        return replace(self, model=self.model.clone(), weights=weights, constants=constants, spread=set())

    @property
    def dtype(self) -> ir.DataType:
        """The dtype of activations and of quantisation scales."""
        return COMPUTE_DTYPE[self.precision]

    def add_weight(self, name: str, source: WeightSource, *, shape: tuple[int, ...], like: ir.Value) -> ir.Value:
        """Add a weight as a graph input with the dtype of ``like``. If the name exists, return that input instead."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        return self._add_input(name, source, shape, like.type)

    def add_shared(self, name: str, value: Tensor, *, like: ir.Value) -> ir.Value:
        """Add a constant that is stored with the weights, with the dtype of ``like``. Equal names share one."""
        for known in self.graph.inputs:
            if known.name == name:
                return known
        added = ir.Value(name=name, shape=ir.Shape(value.shape), type=like.type)
        self.graph.inputs.append(added)
        self.constants[name] = value
        return added

    def add_rounded(self, name: str, source: WeightSource, *, shape: tuple[int, ...]) -> ir.Value:
        """Add a part of a quantised weight as a graph input."""
        assert source.rounding is not None
        dtype = IR_DTYPE[source.rounding.code_dtype] if source.holds == "codes" else self.dtype
        return self._add_input(name, source, shape, ir.TensorType(dtype))

    def _add_input(self, name: str, source: WeightSource, shape: tuple[int, ...], kind: Any) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        self.graph.inputs.append(value)
        self.weights[name] = source
        return value

    def drop_unused_weights(self) -> None:
        """Remove weights and constants that no node reads any more."""
        for value in [value for value in self.graph.inputs if self._is_stored(value) and not value.uses()]:
            self.graph.inputs.remove(value)
            self.weights.pop(str(value.name), None)
            self.constants.pop(str(value.name), None)

    def add_constant(self, values: list[int]) -> ir.Value:
        """A small int64 constant stored in the graph. Equal values share one constant."""
        name = "const_" + "_".join(str(value).replace("-", "m") for value in values)
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def add_scalar(self, name: str, number: np.generic) -> ir.Value:
        """A constant without axes stored in the graph. Equal names share one constant."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.asarray(number), name=name)
        value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def count(self, op_type: str) -> int:
        """The number of nodes of one operator type."""
        return sum(node.op_type == op_type for node in self.graph)

    def _is_stored(self, value: ir.Value) -> bool:
        return value.name in self.weights or value.name in self.constants
