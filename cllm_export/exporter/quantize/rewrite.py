"""Quantisation as a pass: chosen linear layers of a finished graph take integers, and the rest stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from cllm_export.bundle.quantization import Quantization
from cllm_export.bundle.scales import Scales
from cllm_export.bundle.storage import sha256_of
from cllm_export.errors import OptionError, QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.quantize.gptq import Factors
from cllm_export.exporter.quantize.int4 import Int4Groups
from cllm_export.exporter.quantize.int4_dequantize import Int4Dequantize
from cllm_export.exporter.quantize.int8_dynamic import Int8Dynamic
from cllm_export.exporter.quantize.linear import LayerQuantizer, Linear, linear_layers, nodes_of_head
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.exporter.quantize.static_layers import FLOAT8, INT8, ColumnMaximum, StaticLayers

STATIC = {"int8": INT8, "fp8": FLOAT8}
"""Schemes whose activations have scales known before they run."""

HEAD_KEPT, ASKED = "head: kept unless asked for", "kept as asked"
ROLES = {
    "Gather": "embedding",
    "RMSNormalization": "norm",
    "LayerNormalization": "norm",
    "Add": "bias",
}
"""What a weight is for, by the operator that reads it."""


def quantize(
    graph: DecoderGraph,
    options: QuantizeOptions,
    *,
    num_layers: int,
    scales: Scales | None,
    maximum: ColumnMaximum,
) -> None:
    """Rewrite every linear layer but those that are kept; ``graph.quantization`` says what was done.

    Args:
        scales: those of ``options``, opened.
        maximum: reads the largest magnitude of each column of a checkpoint tensor.

    Raises:
        OptionError: a layer to keep is not in the model.
        ScalesError: the scales are of another model, or lack what the scheme needs.
        QuantizationError: no layer is left to quantise, or one cannot be.
        GraphError: a linear layer has a form that no pass of ours leaves.
    """
    linears = list(linear_layers(graph))
    reasons = _reasons(graph, linears, options, num_layers)
    chosen = [linear for linear in linears if linear.name not in reasons]
    if not chosen:
        raise QuantizationError("the graph has no linear layer left to quantise")
    quantizer, method = _quantizer(graph, options, chosen, scales, maximum)
    for linear in chosen:
        quantizer.replace(linear)
    quantized = {linear.name for linear in chosen}
    graph.quantization = Quantization(
        scheme=options.scheme,
        method=method,
        group_size=options.group,
        engines=options.engines,
        weights=tuple(sorted(quantized)),
        kept={name: reason for name, reason in _kept(graph, reasons).items() if name not in quantized},
        scales_sha256=sha256_of(scales.path) if scales else None,
    )


def _quantizer(
    graph: DecoderGraph,
    options: QuantizeOptions,
    chosen: Sequence[Linear],
    scales: Scales | None,
    maximum: ColumnMaximum,
) -> tuple[LayerQuantizer, str]:
    """What replaces the layers, and what its method is called."""
    nearest = "round to nearest"
    if options.group is not None:
        make = Int4Dequantize if "tensorrt" in options.engines else Int4Groups
        if scales is None:
            return make(graph, options.group), nearest
        scales.require_tensors({name: linear.shape[1] for linear in chosen for name in linear.source.tensors})
        for linear in chosen:
            scales.gram(linear.source.tensors[0])  # find out now that there is none
        return make(graph, options.group, Factors(scales)), "GPTQ"
    if scales is not None:
        static = StaticLayers(graph, scales, STATIC[options.scheme], chosen, maximum)
        return static, "SmoothQuant" if options.scheme == "int8" else nearest
    return Int8Dynamic(graph), nearest


def _reasons(graph: DecoderGraph, linears: list[Linear], options: QuantizeOptions, num_layers: int) -> dict[str, str]:
    """Weight of a linear layer that is kept -> why."""
    known = {tensor for linear in linears for tensor in linear.source.tensors}
    if unknown := sorted(set(options.keep) - known):
        raise OptionError(
            f"keep='{unknown[0]}' names no linear layer of the model; give a weight's name as the checkpoint has it, "
            f"such as {min(known)}"
        )
    head = nodes_of_head(graph, num_layers)
    reasons = {linear.name: HEAD_KEPT for linear in linears if linear.node in head and not options.head}
    asked = {linear.name: ASKED for linear in linears if set(linear.source.tensors) & set(options.keep)}
    return reasons | asked


def _kept(graph: DecoderGraph, reasons: dict[str, str]) -> dict[str, str]:
    """Every weight that no rounding changes, and why."""
    kept = {}
    for value in graph.graph.inputs:
        source = graph.weights.get(str(value.name))
        if source is None or source.rounding is not None:
            continue
        readers = {use.node.op_type for use in value.uses()}
        roles = {ROLES.get(reader, reasons.get(str(value.name), reader)) for reader in readers}
        kept[str(value.name)] = ", ".join(sorted(roles))
    return kept
