"""int8-dynamic: 8-bit layers that quantise their input at run time, row by row. For ONNX Runtime's CPU provider.

Rows may affect each other only through attention; otherwise Jacobi decoding is no longer lossless. So every row of an
activation has its own scale. ONNX's DynamicQuantizeLinear has one scale for the whole tensor. With it, later rows of a
block and other slots would change the first rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import INT8_MAX, PairRounding
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

ROW_ZERO = 128
"""Zero point of an activation. Activations are unsigned because ONNX Runtime's kernels for them are faster."""

SCALED_OVER = [-1]
"""Axes over which an activation shares a scale: only its channels, not rows or slots."""


class RowCodes(NamedTuple):
    """Rows as integers, and the nodes that compute them."""

    nodes: list[ir.Node]
    codes: ir.Value
    largest: ir.Value
    """The largest magnitude of each row."""


class RowRounding:
    """Rounds rows to integers with one scale per row: codes = round(127 x / a) + 128.

    x is [B, n, in], and a = max |x| of a row. 127 x / a takes one Div and one QuantizeLinear with scale 1 / 127. A row
    of zeros gives 0 / 0 and unknown integers. The product is later multiplied by a = 0, so the result is 0 again.
    """

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self.step = constants.add_scalar("row_step", np.float32(1 / INT8_MAX))
        self.zero = constants.add_scalar("row_zero", np.uint8(ROW_ZERO))

    def __call__(self, rows: ir.Value) -> RowCodes:
        magnitude = ir.node("Abs", [rows])
        axes = self._constants.add_constant(SCALED_OVER)
        largest = ir.node("ReduceMax", [magnitude.outputs[0], axes], {"keepdims": 1})
        ratio = ir.node("Div", [rows, largest.outputs[0]])
        codes = ir.node("QuantizeLinear", [ratio.outputs[0], self.step, self.zero])
        return RowCodes([magnitude, largest, ratio, codes], codes.outputs[0], largest.outputs[0])


class Int8DynamicLayers:
    """8-bit weights, and activations with one scale per row. Their integer product is exact on every processor.

    The integer product is multiplied by w_scale / 127 of its column and by the largest magnitude of its row.

    Raises:
        QuantizationError: a layer is too wide.
    """

    method = ROUND_TO_NEAREST

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._round = RowRounding(graph)
        self._rounded: dict[ir.Value, RowCodes] = {}
        """Activation -> its codes. All layers that read it share them."""

    def replace(self, linear: Linear) -> None:
        if linear.shape[1] > MAX_WIDTH:
            raise QuantizationError(
                f"{linear.name} takes {linear.shape[1]} channels, beyond {MAX_WIDTH} in 32-bit sums"
            )
        if linear.rows not in self._rounded:
            self._rounded[linear.rows] = self._round(linear.rows)
            self._graph.graph.insert_before(linear.node, self._rounded[linear.rows].nodes)
        _, codes, largest = self._rounded[linear.rows]
        rounding = PairRounding(scale_factor=1 / INT8_MAX)
        weight, scales = add_rounded(self._graph, linear, rounding, transposed=True)
        product = ir.node("MatMulInteger", [codes, weight, self._round.zero])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        scaled = ir.node("Mul", [cast.outputs[0], scales])  # one DequantizeLinear would do both, but is slower
        result = ir.node("Mul", [scaled.outputs[0], largest])
        put_in_place(self._graph, linear.node, [product, cast, scaled, result])


class Int8Dynamic(Scheme):
    """8-bit integers. Each row of an activation has a scale that is computed at run time."""

    def quantizer(self, layers: Layers) -> LayerQuantizer:
        return Int8DynamicLayers(layers.graph)

    def fake(self, layer: FakeInput) -> FakeLayer:
        rounding = RowRounding(layer.constants)
        nodes, codes, largest = rounding(layer.rows)
        shares = ir.node("DequantizeLinear", [codes, rounding.step, rounding.zero])
        restored = ir.node("Mul", [shares.outputs[0], largest])
        return FakeLayer(layer.rounded(PairRounding()), [*nodes, shares, restored])


INT8_DYNAMIC = Int8Dynamic(
    name="int8-dynamic", min_agreement=0.5, unjudged=frozenset({"MatMulInteger", "QuantizeLinear"})
)
