"""int4: 4-bit weights in groups of input channels that share a scale. Each engine has its own graph form.

Both forms have the same integers and scales. Rounding is by GPTQ if there are scales of a calibration, else to nearest.
"""

from __future__ import annotations

import onnx_ir as ir

from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import GroupRounding, Rounding, SignedGroups
from cllm_export.exporter.quantize.gptq import Factors, GptqRounding
from cllm_export.exporter.quantize.linear import Linear, add_rounded, put_in_place
from cllm_export.exporter.quantize.scheme import (
    ROUND_TO_NEAREST,
    FakeInput,
    FakeLayer,
    LayerQuantizer,
    Layers,
    Scheme,
)

DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4
"""Value of the operator's attribute ``accuracy_level``: it computes with 8-bit activations."""

INPUT_CHANNELS = 0
"""Axis of a weight [in, out] along which a group shares a scale."""


class Int4Layers:
    """The common part of both forms: rounds the weight of a layer to 4 bits.

    Args:
        factors: the factors of a calibration, for GPTQ. Without them weights are rounded to nearest.
    """

    def __init__(self, graph: DecoderGraph, group_size: int, factors: Factors | None = None) -> None:
        self._graph = graph
        self._group_size = group_size
        self._factors = factors

    @property
    def method(self) -> str:
        return ROUND_TO_NEAREST if self._factors is None else "GPTQ"

    def _rounding(self, linear: Linear) -> Rounding:
        if self._factors is None:
            return GroupRounding(group_size=self._group_size)
        return GptqRounding(group_size=self._group_size, tensor=linear.source.tensors[0], factors=self._factors)


class Int4ForOnnxRuntime(Int4Layers):
    """x [B, n, in] times a 4-bit weight, by ONNX Runtime's fused operator.

    In each output channel, ``group_size`` input channels share a scale. The operator rounds its input to 8 bits, group
    by group in each row. This is twice as fast as multiplying in fp32, and rows do not affect each other.
    """

    def replace(self, linear: Linear) -> None:
        self._graph.model.opset_imports[DOMAIN] = 1
        out, width = linear.shape
        weight, scales = add_rounded(self._graph, linear, self._rounding(linear), transposed=False)
        attributes = {
            "K": width,
            "N": out,
            "bits": 4,
            "block_size": self._group_size,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        node = ir.node("MatMulNBits", [linear.rows, weight, scales], attributes, domain=DOMAIN)
        put_in_place(self._graph, linear.node, [node])


class Int4ForTensorRT(Int4Layers):
    """x [B, n, in] times a weight [in, out] of signed 4-bit integers, by DequantizeLinear before a MatMul.

    Scales are [in / group_size, out]. TensorRT fuses the two operators into a kernel that reads 4 bits. Activations are
    not quantised. ONNX Runtime dequantises the weight once, at load, and multiplies in fp32. There the result is as
    correct, and the graph as large and slow, as in an unquantised bundle.

    Raises:
        QuantizationError: a layer's input channels do not divide into whole groups, or its output channels are odd.
    """

    def replace(self, linear: Linear) -> None:
        self._require_whole(linear)
        rounding = SignedGroups(inner=self._rounding(linear))
        codes, scales = add_rounded(self._graph, linear, rounding, transposed=True)
        weight = ir.node("DequantizeLinear", [codes, scales], {"axis": INPUT_CHANNELS, "block_size": self._group_size})
        weight.outputs[0].type = ir.TensorType(self._graph.dtype)
        put_in_place(self._graph, linear.node, [weight, ir.node("MatMul", [linear.rows, weight.outputs[0]])])

    def _require_whole(self, linear: Linear) -> None:
        """Check the shape. TensorRT infers the group size by a division, and a byte must not span two rows."""
        (out, width), keep = linear.shape, " ".join(f"keep='{tensor}'" for tensor in linear.source.tensors)
        if width % self._group_size:
            raise QuantizationError(
                f"{linear.name} takes {width} channels, no whole number of groups of {self._group_size} as TensorRT "
                f"needs them: choose another group_size, or leave it out with {keep}"
            )
        if out % 2:
            raise QuantizationError(
                f"{linear.name} gives {out} channels, and a byte holds two of 4 bits: leave it out with {keep}"
            )


class Int4(Scheme):
    """4-bit weights, with one scale for each group of input channels."""

    def quantizer(self, layers: Layers) -> LayerQuantizer:
        assert layers.group_size is not None
        make = Int4ForTensorRT if "tensorrt" in layers.engines else Int4ForOnnxRuntime
        return make(layers.graph, layers.group_size, Factors(layers.scales) if layers.scales else None)

    def fake(self, layer: FakeInput) -> FakeLayer:
        """Round to nearest, even if there are scales: GPTQ would take too long to try on every layer."""
        assert layer.group_size is not None
        return FakeLayer(layer.rounded(GroupRounding(group_size=layer.group_size)), [])


INT4 = Int4(name="int4", min_agreement=0.25, unjudged=frozenset({"MatMulNBits"}), reads_gram=True)
