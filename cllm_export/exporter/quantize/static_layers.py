"""Layers whose activations have one scale that is known before run time: the common part of int8 and fp8.

QuantizeLinear and DequantizeLinear surround a MatMul. They are symmetric, and weights have a scale per output channel.
TensorRT takes this explicit form, and ONNX Runtime runs it. The scale is fixed at run time, so rows cannot affect each
other through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle.scales import Scales
from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import Rounding, ScaledRounding
from cllm_export.exporter.quantize.linear import Linear, add_rounded, put_in_place
from cllm_export.exporter.quantize.scheme import (
    ROUND_TO_NEAREST,
    ColumnMaximum,
    FakeInput,
    FakeLayer,
    LayerQuantizer,
    Layers,
    Scheme,
)

SMOOTHING = 0.5
"""Exponent that sets how much of an activation's range moves into the weight (arXiv 2211.10438)."""

NORMS = frozenset({"RMSNormalization", "LayerNormalization"})


@dataclass(frozen=True, kw_only=True)
class Format:
    """The number format of activations and weights."""

    largest: float
    zero: np.generic
    rounding: Rounding
    smooth: bool
    """Whether channel outliers move into the weight. It helps integers, whose steps are even, but not floats."""

    def step(self, amax: Tensor, factors: Tensor | None) -> float:
        """The scale of an activation; 0 if the activation was 0 in every row.

        Args:
            amax: [in], the largest magnitude of each channel of the activation.
            factors: [in], the divisor of each channel; None if the channels are not divided.
        """
        return float((amax if factors is None else amax / factors).max()) / self.largest

    def rounding_of(self, factors: Tensor | None) -> Rounding:
        """The rounding of a weight. It first multiplies the columns by the divisors of the activation, if any."""
        return self.rounding if factors is None else ScaledRounding(inner=self.rounding, factors=factors)


def rounded_rows(rows: ir.Value, step: ir.Value, zero: ir.Value) -> list[ir.Node]:
    """Nodes that round the rows to multiples of a step; the last one gives the result."""
    codes = ir.node("QuantizeLinear", [rows, step, zero])
    return [codes, ir.node("DequantizeLinear", [codes.outputs[0], step, zero])]


class StaticLayers:
    """Quantises layers with the scales of a calibration.

    Raises:
        ScalesError: a layer was not observed, or has another width.
        QuantizationError: an activation was 0 in every row.
    """

    def __init__(
        self, graph: DecoderGraph, scales: Scales, kind: Format, linears: Sequence[Linear], maximum: ColumnMaximum
    ) -> None:
        self._graph = graph
        self._scales = scales
        self._kind = kind
        self._zero = graph.add_scalar("activation_zero", kind.zero)
        self._quantized: dict[ir.Value, ir.Value] = {}
        self._factors = self._smooth(linears, maximum) if kind.smooth else {}
        """Activation -> the divisor of each of its channels."""

    @property
    def method(self) -> str:
        return "SmoothQuant" if self._kind.smooth else ROUND_TO_NEAREST

    def replace(self, linear: Linear) -> None:
        rounding = self._kind.rounding_of(self._factors.get(linear.rows))
        codes, scales = add_rounded(self._graph, linear, rounding, transposed=True)
        weight = ir.node("DequantizeLinear", [codes, scales], {"axis": 1})
        weight.outputs[0].type = ir.TensorType(self._graph.dtype)
        result = ir.node("MatMul", [self._rows(linear), weight.outputs[0]])
        put_in_place(self._graph, linear.node, [weight, result])

    def _rows(self, linear: Linear) -> ir.Value:
        if linear.rows not in self._quantized:
            step = self._graph.add_scalar(f"{linear.name}.step", self._graph.dtype.numpy().type(self._step(linear)))
            nodes = rounded_rows(linear.rows, step, self._zero)
            self._graph.graph.insert_before(linear.node, nodes)
            self._quantized[linear.rows] = nodes[-1].outputs[0]
        return self._quantized[linear.rows]

    def _step(self, linear: Linear) -> float:
        step = self._kind.step(self._amax(linear), self._factors.get(linear.rows))
        if not step > 0:
            raise QuantizationError(
                f"what {linear.name} takes was 0 in every row of the calibration, so it has no scale: "
                f"calibrate with other prompts, or leave it out with keep='{linear.source.tensors[0]}'"
            )
        return step

    def _amax(self, linear: Linear) -> Tensor:
        return torch.from_numpy(self._scales.of(linear.source.tensors[0]).amax.copy())

    def _smooth(self, linears: Sequence[Linear], maximum: ColumnMaximum) -> dict[ir.Value, Tensor]:
        """Divide the channels of each norm that feeds only quantised layers, through the stored scale of the norm."""
        readers: dict[ir.Value, list[Linear]] = {}
        for linear in linears:
            readers.setdefault(linear.rows, []).append(linear)
        factors = {}
        for rows, group in readers.items():
            norm = rows.producer()
            alone = {use.node for use in rows.uses()} == {linear.node for linear in group}
            if norm is None or norm.op_type not in NORMS or not alone or not self._is_own(norm):
                continue
            weight = torch.stack([maximum(tensor) for linear in group for tensor in linear.source.tensors]).amax(dim=0)
            factors[rows] = smoothing_factors(self._amax(group[0]), weight)
            self._divide(norm, factors[rows])
        return factors

    def _is_own(self, norm: ir.Node) -> bool:
        """Whether the norm's scale (and bias) are stored weights that nothing else reads."""
        stored = [value for value in norm.inputs[1:] if value is not None]
        return all(value.name in self._graph.weights and len(value.uses()) == 1 for value in stored)

    def _divide(self, norm: ir.Node, factors: Tensor) -> None:
        for value in norm.inputs[1:]:
            if value is not None:
                source = self._graph.weights[str(value.name)]
                self._graph.weights[str(value.name)] = replace(source, divisor=factors)


def smoothing_factors(amax: Tensor, weight_amax: Tensor) -> Tensor:
    """amax ** a / weight_amax ** (1 - a) for each channel, with a = ``SMOOTHING``; 1 where either amax is 0."""
    usable = (amax > 0) & (weight_amax > 0)
    factors: Any = amax.clamp(min=1e-30) ** SMOOTHING / weight_amax.clamp(min=1e-30) ** (1 - SMOOTHING)
    return torch.where(usable, factors, 1.0)


@dataclass(frozen=True, kw_only=True)
class StaticScheme(Scheme):
    """Weights and activations in one format. Each activation has one scale from a calibration for all rows."""

    format: Format

    def quantizer(self, layers: Layers) -> LayerQuantizer:
        assert layers.scales is not None
        return StaticLayers(layers.graph, layers.scales, self.format, layers.chosen, layers.column_maximum)

    def fake(self, layer: FakeInput) -> FakeLayer:
        """Emulate the layer. It is smoothed even if no norm produces its rows; a build smooths only norm outputs."""
        assert layer.amax is not None
        kind = self.format
        factors = smoothing_factors(layer.amax, layer.weight.abs().amax(dim=0)) if kind.smooth else None
        step = kind.step(layer.amax, factors) or 1.0
        constants, before, rows = layer.constants, [], layer.rows
        if factors is not None:
            divisor = constants.add_values(f"{layer.name}.factors", factors.numpy())
            before = [ir.node("Div", [rows, divisor])]
            rows = before[0].outputs[0]
        zero = constants.add_scalar("activation_zero", kind.zero)
        after = rounded_rows(rows, constants.add_scalar(f"{layer.name}.step", np.float32(step)), zero)
        return FakeLayer(layer.rounded(kind.rounding_of(factors)), [*before, *after])
