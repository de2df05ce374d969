"""int4: 4-bit weights in groups of input channels that share a scale. Each engine has its own graph form.

Rounding is by GPTQ if there are scales of a calibration, else to nearest.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from cllm_export.bundle.quantization import Engine
from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.groups import ByteGroupRounding, GroupRounding, SignedGroups, num_groups
from cllm_export.exporter.graph.rounding import Rounding
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

CHANNELS = [-1]
"""Axis of the channels of a group, in rows that are split into groups."""

INPUT_CHANNELS = 0
"""Axis of a weight [in, out] along which a group shares a scale."""


class Int4Layers:
    """The common part of both forms: rounds the weight of a layer to 4 bits.

    Args:
        layers: the layers and, for GPTQ, the scales of a calibration. Without them weights are rounded to nearest.
    """

    symmetric: ClassVar[bool]
    """Whether groups have no offset."""

    def __init__(self, layers: Layers) -> None:
        assert layers.group_size is not None
        self._graph = layers.graph
        self._head = layers.head
        self._group_size = layers.group_size
        self._factors = Factors(layers.scales) if layers.scales else None

    @property
    def method(self) -> str:
        return ROUND_TO_NEAREST if self._factors is None else "GPTQ"

    def _rounding(self, linear: Linear) -> Rounding:
        if self._factors is None:
            return GroupRounding(group_size=self._group_size, symmetric=self.symmetric)
        return GptqRounding(
            group_size=self._group_size,
            symmetric=self.symmetric,
            tensor=linear.source.tensors[0],
            factors=self._factors,
        )


class Int4ForOnnxRuntime(Int4Layers):
    """x [B, n, in] times a 4-bit weight with an offset for each group, by ONNX Runtime's fused operator.

    The operator multiplies by scale * code. It rounds its input to 8 bits, group by group in each row. This is twice
    as fast as multiplying in fp32, and rows do not affect each other. A second product adds the rest: the sum of a row
    in each group, times the offsets [groups, out]. The operator itself has no offset that is a float: its integer zero
    points cannot hold the grid of Q4_1.

    The head takes 8 bits, in groups of the same size.
    """

    symmetric = False

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self._sums: dict[ir.Value, ir.Value] = {}
        """Activation -> its sums. All layers that read it share them."""

    def replace(self, linear: Linear) -> None:
        self._graph.model.opset_imports[DOMAIN] = 1
        if linear.name in self._head:
            rounding = ByteGroupRounding(group_size=self._group_size)
            codes, scales = add_rounded(self._graph, linear, rounding, transposed=False)
            put_in_place(self._graph, linear.node, [self._product(linear, codes, scales, bits=8)])
            return
        codes, scales, offsets = add_rounded(self._graph, linear, self._rounding(linear), transposed=False)
        product = self._product(linear, codes, scales, bits=4)
        rest = ir.node("MatMul", [self._group_sums(linear), offsets])
        result = ir.node("Add", [product.outputs[0], rest.outputs[0]])
        put_in_place(self._graph, linear.node, [product, rest, result])

    def _product(self, linear: Linear, codes: ir.Value, scales: ir.Value, *, bits: int) -> ir.Node:
        out, width = linear.shape
        attributes = {
            "K": width,
            "N": out,
            "bits": bits,
            "block_size": self._group_size,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        return ir.node("MatMulNBits", [linear.rows, codes, scales], attributes, domain=DOMAIN)

    def _group_sums(self, linear: Linear) -> ir.Value:
        """The sum of each group of each row, [..., in] -> [..., groups]."""
        rows, width = linear.rows, linear.shape[1]
        if rows not in self._sums:
            nodes, whole = [], rows
            assert rows.shape is not None
            before = [0] * (len(rows.shape) - 1)
            if missing := -width % self._group_size:
                ends = self._graph.add_constant([*before, 0, *before, missing])
                nodes.append(ir.node("Pad", [rows, ends]))
                whole = nodes[-1].outputs[0]
            shape = self._graph.add_constant([*before, num_groups(width, self._group_size), self._group_size])
            groups = ir.node("Reshape", [whole, shape])
            sums = ir.node("ReduceSum", [groups.outputs[0], self._graph.add_constant(CHANNELS)], {"keepdims": 0})
            self._graph.graph.insert_before(linear.node, [*nodes, groups, sums])
            self._sums[rows] = sums.outputs[0]
        return self._sums[rows]


class Int4ForTensorRT(Int4Layers):
    """x [B, n, in] times a weight [in, out] of signed 4-bit integers, by DequantizeLinear before a MatMul.

    Scales are [in / group_size, out]. TensorRT fuses the two operators into a kernel that reads 4 bits. Activations are
    not quantised. ONNX Runtime dequantises the weight once, at load, and multiplies in fp32. There the result is as
    correct, and the graph as large and slow, as in an unquantised bundle. Groups have no offset, since TensorRT takes
    none.

    Raises:
        QuantizationError: a layer's input channels do not divide into whole groups, or its output channels are odd.
    """

    symmetric = True

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


def _form(engine: Engine | None) -> type[Int4ForTensorRT | Int4ForOnnxRuntime]:
    """The layers of an engine's form; None stands for the default."""
    return Int4ForTensorRT if engine == "tensorrt" else Int4ForOnnxRuntime


class Int4(Scheme):
    """4-bit weights. Each group of input channels has a scale and, for ONNX Runtime, an offset."""

    def quantizer(self, layers: Layers) -> LayerQuantizer:
        return _form("tensorrt" if "tensorrt" in layers.engines else "onnxruntime")(layers)

    def fake(self, layer: FakeInput) -> FakeLayer:
        """Round to nearest, even if there are scales: GPTQ would take too long to try on every layer."""
        assert layer.group_size is not None
        rounding = GroupRounding(group_size=layer.group_size, symmetric=_form(layer.engine).symmetric)
        return FakeLayer(layer.rounded(rounding), [])


INT4 = Int4(name="int4", min_agreement=0.25, unjudged=frozenset({"MatMulNBits"}), reads_gram=True)
