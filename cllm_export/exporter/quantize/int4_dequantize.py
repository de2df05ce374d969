"""Layers of 4-bit weights in groups of input channels: ONNX's own DequantizeLinear before a MatMul, for TensorRT.

TensorRT fuses the two into a kernel that reads 4 bits. ONNX Runtime dequantises once, when it loads the graph, and then
multiplies in fp32: as right, and as large and slow as an unquantised bundle. What is fast there is ``int4.py``.
"""

from __future__ import annotations

import onnx_ir as ir

from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import SignedGroups
from cllm_export.exporter.quantize.gptq import Factors
from cllm_export.exporter.quantize.int4 import int4_rounding
from cllm_export.exporter.quantize.linear import Linear, add_rounded, put_in_place

INPUT_CHANNELS = 0
"""Axis of a weight [in, out] along which a group shares a scale."""


class Int4Dequantize:
    """x [B, n, in] times a weight [in, out] of signed 4-bit integers, with scales [in / group_size, out].

    Rounded as ``Int4Groups`` rounds, to the same integers and scales. Rows are multiplied as they are: nothing at run
    time has a scale.

    Raises:
        QuantizationError: a layer's input channels are no whole number of groups, or its output channels are odd.
    """

    def __init__(self, graph: DecoderGraph, group_size: int, factors: Factors | None = None) -> None:
        self._graph = graph
        self._group_size = group_size
        self._factors = factors

    def replace(self, linear: Linear) -> None:
        self._require_whole(linear)
        rounding = SignedGroups(inner=int4_rounding(linear, self._group_size, self._factors))
        codes, scales = add_rounded(self._graph, linear, rounding, transposed=True)
        weight = ir.node("DequantizeLinear", [codes, scales], {"axis": INPUT_CHANNELS, "block_size": self._group_size})
        weight.outputs[0].type = ir.TensorType(self._graph.dtype)
        put_in_place(self._graph, linear.node, [weight, ir.node("MatMul", [linear.rows, weight.outputs[0]])])

    def _require_whole(self, linear: Linear) -> None:
        """TensorRT infers the size of a group by a division; a byte of two rows could not be mapped by row."""
        (out, width), keep = linear.shape, " ".join(f"--keep {tensor}" for tensor in linear.source.tensors)
        if width % self._group_size:
            raise QuantizationError(
                f"{linear.name} takes {width} channels, no whole number of groups of {self._group_size} as TensorRT "
                f"needs them: choose another --group-size, or leave it out with {keep}"
            )
        if out % 2:
            raise QuantizationError(
                f"{linear.name} gives {out} channels, and a byte holds two of 4 bits: leave it out with {keep}"
            )
