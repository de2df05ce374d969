"""Quantises chosen linear layers of a finished graph. The rest of the graph stays unchanged."""

from __future__ import annotations

from collections.abc import Sequence, Set

from cllm_export.bundle.quantization import Quantization
from cllm_export.bundle.scales import Scales
from cllm_export.bundle.storage import sha256_of
from cllm_export.errors import OptionError, QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rotate import RotationPlan
from cllm_export.exporter.quantize.linear import Linear, linear_layers, nodes_of_head
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.exporter.quantize.scheme import ColumnMaximum, Layers, Scheme
from cllm_export.exporter.quantize.schemes import SCHEMES

HEAD_KEPT, ASKED = "head: kept unless asked for", "kept as asked"
ROLES = {
    "Gather": "embedding",
    "RMSNormalization": "norm",
    "LayerNormalization": "norm",
    "Add": "bias",
}
"""Operator that reads a weight -> role of the weight."""


def quantize(
    graph: DecoderGraph,
    options: QuantizeOptions,
    *,
    num_layers: int,
    scales: Scales | None,
    maximum: ColumnMaximum,
    rotation: RotationPlan | None = None,
) -> None:
    """Rewrite every linear layer except the kept ones, and record the result in ``graph.quantization``.

    Args:
        scales: the opened scales file of ``options``.
        maximum: gives the largest magnitude of each column of a checkpoint tensor.
        rotation: what was rotated in the graph; None if nothing should be.

    Raises:
        OptionError: a layer to keep is not in the model.
        ScalesError: the scales belong to another model, or lack data that the scheme needs.
        QuantizationError: no layer is left to quantise, or a layer cannot be quantised.
        GraphError: a linear layer has a form that no pass of the exporter produces.
    """
    linears = list(linear_layers(graph))
    nodes = nodes_of_head(graph, num_layers)
    head = {linear.name for linear in linears if linear.node in nodes}
    reasons = _reasons(linears, head, options)
    chosen = [linear for linear in linears if linear.name not in reasons]
    if not chosen:
        raise QuantizationError("the graph has no linear layer left to quantise")
    scheme = SCHEMES[options.scheme]
    if scales is not None:
        _require_scales(scales, chosen, scheme)
    layers = Layers(
        graph=graph,
        chosen=chosen,
        head=head,
        engines=options.form.engines,
        group_size=options.settled_group_size,
        scales=scales,
        column_maximum=maximum,
    )
    quantizer = scheme.quantizer(layers)
    for linear in chosen:
        quantizer.replace(linear)
    quantized = {linear.name for linear in chosen}
    graph.quantization = Quantization(
        scheme=options.scheme,
        method=quantizer.method,
        group_size=layers.group_size,
        engines=layers.engines,
        weights=tuple(sorted(quantized)),
        kept={name: reason for name, reason in _kept(graph, reasons).items() if name not in quantized},
        scales_sha256=sha256_of(scales.path) if scales else None,
        rotated=rotation.rotated if rotation else (),
        unrotated=dict(rotation.refused) if rotation else {},
    )


def _require_scales(scales: Scales, chosen: Sequence[Linear], scheme: Scheme) -> None:
    """Check before any work that the scales have the data that each layer needs."""
    scales.require_tensors({tensor: linear.shape[1] for linear in chosen for tensor in linear.source.tensors})
    if scheme.reads_gram:
        for linear in chosen:
            scales.gram(linear.source.tensors[0])


def _reasons(linears: list[Linear], head: Set[str], options: QuantizeOptions) -> dict[str, str]:
    """Weight of a linear layer that is kept -> the reason."""
    known = {tensor for linear in linears for tensor in linear.source.tensors}
    if unknown := sorted(set(options.keep) - known):
        example = min(known, key=lambda name: (".layers." not in name, name))
        raise OptionError(
            f"keep='{unknown[0]}' names no linear layer of the model; give a weight's name as the checkpoint has it, "
            f"such as {example}"
        )
    reasons = {name: HEAD_KEPT for name in head if not options.head}
    asked = {linear.name: ASKED for linear in linears if set(linear.source.tensors) & set(options.keep)}
    return reasons | asked


def _kept(graph: DecoderGraph, reasons: dict[str, str]) -> dict[str, str]:
    """Every weight that is not rounded -> the reason, or the role of the weight."""
    kept = {}
    for value in graph.graph.inputs:
        source = graph.weights.get(str(value.name))
        if source is None or source.rounding is not None:
            continue
        readers = {use.node.op_type for use in value.uses()}
        roles = {ROLES.get(reader, reasons.get(str(value.name), reader)) for reader in readers}
        kept[str(value.name)] = ", ".join(sorted(roles))
    return kept
