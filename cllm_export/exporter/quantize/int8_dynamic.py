"""int8-dynamic: 8-bit layers that quantise their input at run time, row by row. For ONNX Runtime's CPU provider.

Rows may affect each other only through attention; otherwise Jacobi decoding is no longer lossless. So every row of an
activation has its own scale. ONNX's DynamicQuantizeLinear has one scale for the whole tensor. With it, later rows of a
block and other slots would change the first rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import INT8_MAX, ChannelRounding, PairRounding, Rounding
from cllm_export.exporter.quantize.linear import Linear, add_rounded, put_in_place
from cllm_export.exporter.quantize.scheme import (
    ROUND_TO_NEAREST,
    Constants,
    FakeInput,
    FakeLayer,
    LayerQuantizer,
    Layers,
    Scheme,
)

MAX_WIDTH = (2**31 - 1) // INT8_MAX**2
"""Largest number of input channels of an 8-bit layer. With more, a sum of products might not fit in 32 bits."""

SCALED_OVER = [-1]
"""Axes over which an activation shares a scale: only its channels, not rows or slots."""

HALVES = -2
"""Axis of rows, along which the two halves of an activation stand one after the other."""


class RowCodes(NamedTuple):
    """Rows as integers, and the nodes that compute them."""

    nodes: list[ir.Node]
    codes: ir.Value
    """[..., m, in], unsigned; m is n, or 2 n for two halves."""
    factors: ir.Value
    """[..., m, 1]: what a row of codes is multiplied by to restore it."""


class RowRounding(Protocol):
    """Rounds rows [..., n, in] to integers with one scale per row, for an integer product with a weight.

    A row of zeros gives 0 / 0 and unknown integers. The product is later multiplied by a factor of 0, so the result
    is 0 again.
    """

    zero: ir.Value
    """The code of 0. Codes are unsigned because ONNX Runtime's kernels for them are faster."""
    weight: Rounding
    """The rounding of a weight that no processor's kernel saturates with, whatever the rows hold."""

    def __call__(self, rows: ir.Value) -> RowCodes: ...

    def joined(self, product: ir.Value) -> list[ir.Node]:
        """Nodes that give [..., n, out] from the product [..., m, out] of every row; none if m is n."""
        ...


class CoarseRows(RowRounding):
    """8 bits: codes = round(127 x / a) + 128, with a = max |x| of a row.

    For rows whose channels a rotation has spread. In other rows a few channels are tens of times larger than the rest,
    which then has few of the 255 steps.
    """

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._step = constants.add_scalar("coarse_step", np.float32(1 / INT8_MAX))
        self.zero = constants.add_scalar("coarse_zero", np.uint8(128))
        self.weight = PairRounding(scale_factor=1 / INT8_MAX)

    def __call__(self, rows: ir.Value) -> RowCodes:
        nodes = _largest(rows, self._constants)
        factors = nodes[-1].outputs[0]
        ratio = ir.node("Div", [rows, factors])
        codes = ir.node("QuantizeLinear", [ratio.outputs[0], self._step, self.zero])
        return RowCodes([*nodes, ratio, codes], codes.outputs[0], factors)

    def joined(self, product: ir.Value) -> list[ir.Node]:
        return []


class FineRows(RowRounding):
    """14 bits in two halves of 7: x = s (c + f / 126), with s = max |x| / 63 of a row, and integers c and f up to 63.

    The halves are twice as many rows of one integer product. Two products of 7 by 8 bits fit in 16, so weights keep all
    of their 8 bits even where a kernel adds such pairs in 16 bits.
    """

    STEPS, SHARE, ZERO = 63, 126, 64

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self.zero = constants.add_scalar("fine_zero", np.uint8(self.ZERO))
        self.weight = ChannelRounding()

    def __call__(self, rows: ir.Value) -> RowCodes:
        nodes = _largest(rows, self._constants)
        step = self._times(nodes[-1].outputs[0], "fine_step", 1 / self.STEPS)
        less = self._times(step.outputs[0], "fine_share", 1 / self.SHARE)
        factors = ir.node("Concat", [step.outputs[0], less.outputs[0]], {"axis": HALVES})
        scaled = ir.node("Div", [rows, step.outputs[0]])
        upper = ir.node("Round", [scaled.outputs[0]])
        rest = ir.node("Sub", [scaled.outputs[0], upper.outputs[0]])
        lower = self._times(rest.outputs[0], "fine_steps", self.SHARE)
        both = ir.node("Concat", [upper.outputs[0], lower.outputs[0]], {"axis": HALVES})
        unit = self._constants.add_scalar("fine_unit", np.float32(1))
        codes = ir.node("QuantizeLinear", [both.outputs[0], unit, self.zero])
        nodes += [step, less, factors, scaled, upper, rest, lower, both, codes]
        return RowCodes(nodes, codes.outputs[0], factors.outputs[0])

    def joined(self, product: ir.Value) -> list[ir.Node]:
        halves = ir.node("Split", [product], {"axis": HALVES, "num_outputs": 2}, num_outputs=2)
        return [halves, ir.node("Add", halves.outputs)]

    def _times(self, value: ir.Value, name: str, factor: float) -> ir.Node:
        return ir.node("Mul", [value, self._constants.add_scalar(name, np.float32(factor))])


def row_rounding(constants: Constants, *, spread: bool) -> RowRounding:
    """The rounding of rows whose channels a rotation has spread, or of others."""
    return CoarseRows(constants) if spread else FineRows(constants)


def _largest(rows: ir.Value, constants: Constants) -> list[ir.Node]:
    """Nodes that give the largest magnitude of each row, [..., n, 1]."""
    magnitude = ir.node("Abs", [rows])
    axes = constants.add_constant(SCALED_OVER)
    return [magnitude, ir.node("ReduceMax", [magnitude.outputs[0], axes], {"keepdims": 1})]


class Int8DynamicLayers:
    """8-bit weights, and activations with one scale per row. Their integer product is exact on every processor.

    The integer product is multiplied by the factor of its row and by the scale of its column.

    Raises:
        QuantizationError: a layer is too wide.
    """

    method = ROUND_TO_NEAREST

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._rounded: dict[ir.Value, RowCodes] = {}
        """Activation -> its codes. All layers that read it share them."""

    def replace(self, linear: Linear) -> None:
        if linear.shape[1] > MAX_WIDTH:
            raise QuantizationError(
                f"{linear.name} takes {linear.shape[1]} channels, beyond {MAX_WIDTH} in 32-bit sums"
            )
        rounding = row_rounding(self._graph, spread=linear.rows in self._graph.spread)
        if linear.rows not in self._rounded:
            self._rounded[linear.rows] = rounding(linear.rows)
            self._graph.graph.insert_before(linear.node, self._rounded[linear.rows].nodes)
        _, codes, factors = self._rounded[linear.rows]
        weight, scales = add_rounded(self._graph, linear, rounding.weight, transposed=True)
        product = ir.node("MatMulInteger", [codes, weight, rounding.zero])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        of_rows = ir.node("Mul", [cast.outputs[0], factors])
        nodes = [product, cast, of_rows, *rounding.joined(of_rows.outputs[0])]
        result = ir.node("Mul", [nodes[-1].outputs[0], scales])  # one DequantizeLinear would do it and the cast: slower
        put_in_place(self._graph, linear.node, [*nodes, result])


class Int8Dynamic(Scheme):
    """8-bit integers. Each row of an activation has a scale that is computed at run time."""

    def quantizer(self, layers: Layers) -> LayerQuantizer:
        return Int8DynamicLayers(layers.graph)

    def fake(self, layer: FakeInput) -> FakeLayer:
        rounding = row_rounding(layer.constants, spread=layer.spread)
        nodes, codes, factors = rounding(layer.rows)
        whole = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
        zero = ir.node("Cast", [rounding.zero], {"to": ir.DataType.FLOAT})
        shifted = ir.node("Sub", [whole.outputs[0], zero.outputs[0]])
        restored = ir.node("Mul", [shifted.outputs[0], factors])
        nodes += [whole, zero, shifted, restored, *rounding.joined(restored.outputs[0])]
        return FakeLayer(layer.rounded(rounding.weight), nodes)


INT8_DYNAMIC = Int8Dynamic(
    name="int8-dynamic", min_agreement=0.5, unjudged=frozenset({"MatMulInteger", "QuantizeLinear"})
)
