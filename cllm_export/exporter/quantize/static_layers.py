"""Layers whose activations have one scale, known before they run: 8-bit integers, or 8-bit floats (E4M3).

QuantizeLinear and DequantizeLinear around a MatMul, symmetric, weights by output channel: the explicit form that
TensorRT takes and ONNX Runtime runs. A scale that nothing at run time changes cannot let rows see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle.scales import Scales
from cllm_export.errors import QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import INT8_MAX, ChannelRounding, Float8Rounding, Rounding, ScaledRounding
from cllm_export.exporter.quantize.linear import Linear, add_rounded, put_in_place

FLOAT8_MAX = 448.0
"""The largest number of E4M3."""

SMOOTHING = 0.5
"""Share of an activation's range that moves into the weight, on a scale of powers (arXiv 2211.10438)."""

NORMS = frozenset({"RMSNormalization", "LayerNormalization"})

ColumnMaximum = Callable[[str], Tensor]
"""Largest magnitude [in] of each column of a checkpoint tensor."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What activations and weights become."""

    largest: float
    zero: np.generic
    rounding: Rounding
    smooth: bool
    """Whether outliers of channels are worth moving into the weight: integers have evenly spaced steps, floats not."""


INT8 = Format(largest=INT8_MAX, zero=np.int8(0), rounding=ChannelRounding(), smooth=True)
FLOAT8 = Format(
    largest=FLOAT8_MAX,
    zero=ir.DataType.FLOAT8E4M3FN.numpy().type(0),
    rounding=Float8Rounding(largest=FLOAT8_MAX),
    smooth=False,
)


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
        scales.require_tensors({tensor: linear.shape[1] for linear in linears for tensor in linear.source.tensors})
        self._factors = self._smooth(linears, maximum) if kind.smooth else {}
        """Activation -> what each of its channels was divided by."""

    def replace(self, linear: Linear) -> None:
        factors = self._factors.get(linear.rows)
        inner = self._kind.rounding
        rounding = inner if factors is None else ScaledRounding(inner=inner, factors=factors)
        codes, scales = add_rounded(self._graph, linear, rounding, transposed=True)
        weight = ir.node("DequantizeLinear", [codes, scales], {"axis": 1})
        weight.outputs[0].type = ir.TensorType(self._graph.dtype)
        result = ir.node("MatMul", [self._rows(linear), weight.outputs[0]])
        put_in_place(self._graph, linear.node, [weight, result])

    def _rows(self, linear: Linear) -> ir.Value:
        if linear.rows not in self._quantized:
            step = self._graph.add_scalar(f"{linear.name}.step", self._graph.dtype.numpy().type(self._step(linear)))
            codes = ir.node("QuantizeLinear", [linear.rows, step, self._zero])
            back = ir.node("DequantizeLinear", [codes.outputs[0], step, self._zero])
            self._graph.graph.insert_before(linear.node, [codes, back])
            self._quantized[linear.rows] = back.outputs[0]
        return self._quantized[linear.rows]

    def _step(self, linear: Linear) -> float:
        amax = torch.from_numpy(self._scales.of(linear.source.tensors[0]).amax.copy())
        factors = self._factors.get(linear.rows)
        largest = float((amax if factors is None else amax / factors).max())
        if not largest > 0:
            raise QuantizationError(
                f"what {linear.name} takes was 0 in every row of the calibration, so it has no scale: "
                f"calibrate with other prompts, or leave it out with keep='{linear.source.tensors[0]}'"
            )
        return largest / self._kind.largest

    def _smooth(self, linears: Sequence[Linear], maximum: ColumnMaximum) -> dict[ir.Value, Tensor]:
        """Divide the channels of each norm that feeds quantised layers alone, in its own stored scale."""
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
            amax = torch.from_numpy(self._scales.of(group[0].source.tensors[0]).amax.copy())
            factors[rows] = smoothing_factors(amax, weight)
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
    """amax ** a / weight_amax ** (1 - a) for each channel, 1 where either is 0."""
    usable = (amax > 0) & (weight_amax > 0)
    factors: Any = amax.clamp(min=1e-30) ** SMOOTHING / weight_amax.clamp(min=1e-30) ** (1 - SMOOTHING)
    return torch.where(usable, factors, 1.0)
