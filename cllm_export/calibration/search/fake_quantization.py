"""Stand-ins for quantised layers: weights and activations rounded as a scheme rounds them, in an fp32 graph.

For ranking layers and trying sets of them in seconds instead of building a bundle for each. What a bundle really
computes is the quantiser's matter, so whatever a stand-in promises is measured again on a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.quantization import BELOW_PAIR, MAX_PAIR, PAIRED, SCHEMES, Scheme
from cllm_export.bundle.scales import FloatArray, Scales
from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.stored_weights import read_weight
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import CalibrationError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

INT8_MAX, INT4_MAX, FLOAT8_MAX = 127, 7, 448
FLOAT8_BITS, FLOAT8_LEAST = 3, -6
"""Bits behind the first of an E4M3 number, and the exponent below which there are fewer (arXiv 2209.05433)."""
SMOOTHING = 0.5
"""Share of an activation's range that smoothing moves into the weight (arXiv 2211.10438)."""


@dataclass(frozen=True, kw_only=True)
class FakeQuantization:
    """What a scheme does to a linear layer.

    ``int8-dynamic`` and ``int8``: 8-bit weights, a scale an output channel; activations with a scale a row, or one for
    all rows after smoothing. ``int4``: 4-bit weights alone, a scale for each ``group_size`` input channels.
    ``fp8``: 8-bit floats (E4M3) for both, a scale an output channel and one for all rows.
    """

    scheme: Scheme
    scales: Scales | None = None
    """What ``int8`` and ``fp8`` take their activation scales from."""
    group_size: int = 32

    def __post_init__(self) -> None:
        require_one_of("precision", self.scheme, SCHEMES)
        require_at_least("group_size", self.group_size, 1)
        if self.scheme in ("int8", "fp8") and self.scales is None:
            raise CalibrationError(
                f"{self.scheme} needs scales: make them with cllm-export calibrate, and give them as scales",
                fields=("scales",),
            )


def fake_quantized(
    bundle: Bundle, graph: ModelProto, layers: Iterable[LinearLayer], how: FakeQuantization
) -> tuple[ModelProto, dict[str, FloatArray]]:
    """A copy of a bundle's fp32 graph with these layers rounded, and the weights that it then takes.

    Raises:
        CalibrationError: the bundle is not fp32, or a layer has no scales.
    """
    from onnx import ModelProto

    if bundle.manifest.precision != "fp32":
        raise CalibrationError(f"{bundle.path} is {bundle.manifest.precision}; stand-ins need an fp32 bundle")
    copy = ModelProto()
    copy.CopyFrom(graph)
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = {}
    for layer in layers:
        stored = read_weight(bundle, initializers[layer.weight])
        matrix = stored if layer.transposed else stored.T  # [out, in]
        rounded = _round_layer(copy, layer, matrix, how)
        weights[layer.weight] = np.ascontiguousarray(rounded if layer.transposed else rounded.T)
    return copy, weights


def round_blocks(matrix: FloatArray, largest: int, block: int) -> FloatArray:
    """A matrix [out, in] rounded to integers up to ``largest``, one scale for ``block`` input channels, as fp32."""
    out, width = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -width % block))).reshape(out, -1, block)
    scales = np.abs(padded).max(axis=-1, keepdims=True) / largest
    scales[scales == 0] = 1
    rounded: FloatArray = (np.round(padded / scales) * scales).reshape(out, -1)[:, :width].astype(np.float32)
    return rounded


def round_pairs(matrix: FloatArray) -> FloatArray:
    """A matrix [out, in] rounded to 8 bits as ``int8-dynamic`` has them, one scale an output channel, as fp32."""
    magnitudes = np.abs(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % PAIRED))))
    pairs = np.sort(magnitudes.reshape(matrix.shape[0], -1, PAIRED), axis=-1)[..., -2:].sum(axis=-1).max(axis=1)
    scales = np.maximum(magnitudes.max(axis=1) / INT8_MAX, pairs / (MAX_PAIR * BELOW_PAIR))[:, None]
    scales[scales == 0] = 1
    rounded: FloatArray = (np.round(matrix / scales) * scales).astype(np.float32)
    return rounded


def round_float8(matrix: FloatArray) -> FloatArray:
    """A matrix [out, in] rounded to 8-bit floats (E4M3), one scale an output channel, as fp32."""
    scales = np.abs(matrix).max(axis=1, keepdims=True) / FLOAT8_MAX
    scales[scales == 0] = 1
    _, exponents = np.frexp(matrix / scales)
    steps = np.exp2(np.maximum(exponents - 1, FLOAT8_LEAST) - FLOAT8_BITS)
    rounded: FloatArray = (np.round(matrix / scales / steps) * steps * scales).astype(np.float32)
    return rounded


def _round_layer(graph: ModelProto, layer: LinearLayer, matrix: FloatArray, how: FakeQuantization) -> FloatArray:
    if how.scheme == "int4":
        return round_blocks(matrix, INT4_MAX, how.group_size)
    if how.scheme == "int8-dynamic":
        _put_before(graph, layer, _rounding_by_row(layer))
        return round_pairs(matrix)
    assert how.scales is not None
    amax = how.scales.of(layer.tensors[0]).amax
    if how.scheme == "fp8":
        _put_before(graph, layer, _rounding_to_float8(graph, layer, float(amax.max()) / FLOAT8_MAX))
        return round_float8(matrix)
    smoothing = smoothing_factors(amax, np.abs(matrix).max(axis=0))
    step = float((amax / smoothing).max()) / INT8_MAX
    _put_before(graph, layer, _rounding_by_tensor(graph, layer, smoothing, step))
    return round_blocks(matrix * smoothing, INT8_MAX, matrix.shape[1])


def smoothing_factors(amax: FloatArray, weight_amax: FloatArray) -> FloatArray:
    """What each input channel is divided by, and its column of the weight multiplied with; 1 where either is 0."""
    usable = (amax > 0) & (weight_amax > 0)
    factors = np.ones_like(amax)
    factors[usable] = amax[usable] ** SMOOTHING / weight_amax[usable] ** (1 - SMOOTHING)
    return factors


def _rounding_by_row(layer: LinearLayer) -> list[NodeProto]:
    """rows -> round(127 rows / a) a / 127 with a = max |row|; a row of zeros stays one."""
    from onnx import helper

    names = [
        f"fake.{layer.weight}.{part}" for part in ("abs", "amax", "some", "ratio", "scaled", "codes", "back", "out")
    ]
    magnitude, amax, some, ratio, scaled, codes, back, out = names
    limit, tiny = _constant(f"fake.{layer.weight}.limit", INT8_MAX), _constant(f"fake.{layer.weight}.tiny", 1e-30)
    axis = helper.make_node("Constant", [], [f"fake.{layer.weight}.axis"], value_ints=[-1])
    return [
        limit,
        tiny,
        axis,
        helper.make_node("Abs", [layer.rows], [magnitude]),
        helper.make_node("ReduceMax", [magnitude, axis.output[0]], [amax], keepdims=1),
        helper.make_node("Max", [amax, tiny.output[0]], [some]),
        helper.make_node("Div", [layer.rows, some], [ratio]),
        helper.make_node("Mul", [ratio, limit.output[0]], [scaled]),
        helper.make_node("Round", [scaled], [codes]),
        helper.make_node("Mul", [codes, some], [back]),
        helper.make_node("Div", [back, limit.output[0]], [out]),
    ]


def _rounding_by_tensor(graph: ModelProto, layer: LinearLayer, smoothing: FloatArray, step: float) -> list[NodeProto]:
    """rows -> clip(round(rows / (smoothing step))) step: what a smoothed weight takes."""
    from onnx import helper, numpy_helper

    name = f"fake.{layer.weight}"
    graph.graph.initializer.append(numpy_helper.from_array(smoothing * np.float32(step), f"{name}.steps"))
    low, high, back = (
        _constant(f"{name}.{part}", value) for part, value in (("low", -INT8_MAX), ("high", INT8_MAX), ("step", step))
    )
    return [
        low,
        high,
        back,
        helper.make_node("Div", [layer.rows, f"{name}.steps"], [f"{name}.ratio"]),
        helper.make_node("Round", [f"{name}.ratio"], [f"{name}.rounded"]),
        helper.make_node("Clip", [f"{name}.rounded", low.output[0], high.output[0]], [f"{name}.codes"]),
        helper.make_node("Mul", [f"{name}.codes", back.output[0]], [f"{name}.out"]),
    ]


def _rounding_to_float8(graph: ModelProto, layer: LinearLayer, step: float) -> list[NodeProto]:
    """rows -> E4M3(rows / step) step, which saturates; rows that were always 0 stay as they are."""
    from onnx import TensorProto, helper

    name = f"fake.{layer.weight}"
    zero = helper.make_tensor(f"{name}.zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    graph.graph.initializer.append(zero)
    scale = _constant(f"{name}.step", step or 1.0)
    given = [scale.output[0], zero.name]
    return [
        scale,
        helper.make_node("QuantizeLinear", [layer.rows, *given], [f"{name}.codes"]),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *given], [f"{name}.out"]),
    ]


def _constant(name: str, value: float) -> NodeProto:
    from onnx import helper

    return helper.make_node("Constant", [], [name], value_float=float(value))


def _put_before(graph: ModelProto, layer: LinearLayer, nodes: list[NodeProto]) -> None:
    """Let a layer read what the last of these nodes gives."""
    position, node = next(
        (index, node)
        for index, node in enumerate(graph.graph.node)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] == layer.weight
    )
    node.input[0] = nodes[-1].output[0]
    for offset, added in enumerate(nodes):
        graph.graph.node.insert(position + offset, added)
