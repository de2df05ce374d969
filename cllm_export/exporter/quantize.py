"""Quantisation as a pass: the linear layers of a finished graph take integers, and the rest stays as it is.

Rows must not see each other except through attention, or Jacobi decoding is not lossless any more. So an activation
that is quantised at run time has a scale of its own in every row; ONNX's DynamicQuantizeLinear has one for the whole
tensor, and with it the later rows of a block and other slots change the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from cllm_export.contract import hidden_name
from cllm_export.errors import GraphError, OptionError, QuantizationError
from cllm_export.exporter.graph import DecoderGraph, Holds, WeightSource
from cllm_export.exporter.rounding import INT8_MAX, UINT8_ZERO, ChannelRounding, Rounding
from cllm_export.quantization import SCHEMES, Quantization, Scheme

MAX_INT8_WIDTH = (2**31 - 1) // INT8_MAX**2
"""Input channels of an 8-bit layer, at most: one more and a sum of products might not fit 32 bits."""

SCALED_OVER = [-1]
"""Axes that share a scale of an activation: its channels, and no axis of rows or slots."""

HEAD_KEPT = "head: kept unless asked for"
ROLES = {
    "Gather": "embedding",
    "RMSNormalization": "norm",
    "LayerNormalization": "norm",
    "Add": "bias",
}
"""What a weight is for, by the operator that reads it."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What ``cllm-export build`` lets the user choose of quantisation."""

    scheme: Scheme
    head: bool = False
    """Quantise the head too."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise OptionError(f"the scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")


def quantize_options(scheme: Scheme | None, *, head: bool = False) -> QuantizeOptions | None:
    """Options of a scheme; None where nothing is quantised.

    Raises:
        OptionError: an option of quantisation was given for nothing to quantise.
    """
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, head=head)
    if head:
        raise OptionError(f"--quantize-head needs a --precision that quantises: {', '.join(SCHEMES)}")
    return None


class Linear(NamedTuple):
    """One linear layer: rows times a weight, without its bias."""

    node: ir.Node
    name: str
    """Of its weight."""
    source: WeightSource
    """Its rows are output channels, [out, in], before it is transposed."""
    shape: tuple[int, int]
    """[out, in]"""


def quantize(graph: DecoderGraph, options: QuantizeOptions, *, num_layers: int) -> None:
    """Rewrite every linear layer but those that are kept; ``graph.quantization`` says what was done.

    Raises:
        QuantizationError: the graph has no linear layer that could be quantised, or one that is too wide.
        GraphError: a linear layer has a form that no pass of ours leaves.
    """
    linears = list(_linears(graph))
    head = {linear.name for linear in linears if linear.node in set(_after_last_layer(graph, num_layers))}
    chosen = [linear for linear in linears if options.head or linear.name not in head]
    if not chosen:
        raise QuantizationError("the graph has no linear layer to quantise")
    rewriter = _Int8Dynamic(graph)
    for linear in chosen:
        rewriter.replace(linear)
    names = {linear.name for linear in chosen}
    kept = {name: reason for name, reason in _kept(graph, head - names).items() if name not in names}
    graph.quantization = Quantization(
        scheme=options.scheme,
        method="round to nearest",
        block_size=None,
        engines=("onnxruntime",),
        weights=tuple(sorted(names)),
        kept=kept,
    )


class _Int8Dynamic:
    """Layers of 8-bit weights that quantise what they take at run time, row by row.

    For x [B, n, in] with a = max |x| of a row: codes = round(127 x / a) + 128, and the product of codes, in integers,
    is multiplied by w_scale / 127 of its column and by a of its row. 127 x / a is one Div and one QuantizeLinear with
    scale 1 / 127. A row of zeros gives 0 / 0, whatever integers that becomes, and then times 0: so 0 again.
    """

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """Activation -> its codes and the largest magnitude of each row, made once for all layers that take it."""
        self._step = graph.add_scalar("row_step", np.float32(1 / INT8_MAX))
        self._zero = graph.add_scalar("uint8_zero", np.uint8(UINT8_ZERO))

    def replace(self, linear: Linear) -> None:
        if linear.shape[1] > MAX_INT8_WIDTH:
            raise QuantizationError(
                f"{linear.name} takes {linear.shape[1]} channels, beyond {MAX_INT8_WIDTH} in 32-bit sums"
            )
        rows, node, graph = linear.node.inputs[0], linear.node, self._graph
        assert rows is not None
        codes, largest = self._rows(rows, before=node)
        weight, scales = add_rounded(graph, linear, ChannelRounding(scale_factor=1 / INT8_MAX), transposed=True)
        product = ir.node("MatMulInteger", [codes, weight, self._zero, self._zero])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        scaled = ir.node("Mul", [cast.outputs[0], scales])  # a DequantizeLinear does both and takes longer
        result = ir.node("Mul", [scaled.outputs[0], largest])
        _put(graph, node, [product, cast, scaled, result])

    def _rows(self, rows: ir.Value, *, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        if rows not in self._quantized:
            magnitude = ir.node("Abs", [rows])
            axes = self._graph.add_constant(SCALED_OVER)
            largest = ir.node("ReduceMax", [magnitude.outputs[0], axes], {"keepdims": 1})
            ratio = ir.node("Div", [rows, largest.outputs[0]])
            codes = ir.node("QuantizeLinear", [ratio.outputs[0], self._step, self._zero])
            self._graph.graph.insert_before(before, [magnitude, largest, ratio, codes])
            self._quantized[rows] = codes.outputs[0], largest.outputs[0]
        return self._quantized[rows]


def add_rounded(
    graph: DecoderGraph, linear: Linear, rounding: Rounding, *, transposed: bool
) -> tuple[ir.Value, ir.Value]:
    """The codes and the scales of a layer's weight, as weights of the graph."""
    out, width = linear.shape
    code_shape, scale_shape = rounding.row_shapes(width)
    made = []
    parts: tuple[tuple[Holds, tuple[int, ...]], ...] = (("codes", code_shape), ("scales", scale_shape))
    for holds, row_shape in parts:
        shape = (out, *row_shape)
        turned = transposed and len(shape) == 2
        source = replace(linear.source, transposed=turned, rounding=rounding, holds=holds)
        made.append(graph.add_rounded(f"{linear.name}.{holds}", source, shape=shape[::-1] if turned else shape))
    return made[0], made[1]


def _put(graph: DecoderGraph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them gives its result."""
    result, old = nodes[-1].outputs[0], node.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.graph.remove(node, safe=True)


def _linears(graph: DecoderGraph) -> Iterator[Linear]:
    """Every MatMul or Gemm with a stored weight of two axes, in graph order."""
    for node in list(graph.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.name not in graph.weights or weight.shape is None or len(weight.shape) != 2:
            continue
        source = graph.weights[str(weight.name)]
        first, second = (int(dim) for dim in weight.shape.dims)  # type: ignore[arg-type]
        if node.op_type == "Gemm" and not (_attribute(node, "transB") == 1 and len(node.inputs) == 2):
            raise GraphError(f"{weight.name} is read by a Gemm of an unknown form")
        shape = (second, first) if node.op_type == "MatMul" else (first, second)
        if source.transposed != (node.op_type == "MatMul"):
            raise GraphError(f"{weight.name} is stored {first} x {second}, not as a {node.op_type} of ours takes it")
        yield Linear(node, str(weight.name), source, shape)


def _attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None


def _after_last_layer(graph: DecoderGraph, num_layers: int) -> Iterator[ir.Node]:
    """Nodes behind the value that leaves the last layer."""
    nodes = iter(graph.graph)
    last = hidden_name(num_layers)
    for node in nodes:
        if any(value.name == last for value in node.outputs):
            break
    yield from nodes


def _kept(graph: DecoderGraph, head: set[str]) -> dict[str, str]:
    """Every weight that no rounding changes, and why."""
    kept = {}
    for value in graph.graph.inputs:
        source = graph.weights.get(str(value.name))
        if source is None or source.rounding is not None:
            continue
        readers = {use.node.op_type for use in value.uses()}
        roles = {ROLES.get(reader, HEAD_KEPT if value.name in head else reader) for reader in readers}
        kept[str(value.name)] = ", ".join(sorted(roles))
    return kept
