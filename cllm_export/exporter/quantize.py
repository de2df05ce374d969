"""Quantisation as a pass: chosen linear layers of a finished graph take integers, and the rest stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_export.contract import require_at_least
from cllm_export.errors import OptionError, QuantizationError
from cllm_export.exporter.graph import DecoderGraph
from cllm_export.exporter.int4 import Int4Blocks
from cllm_export.exporter.int8_dynamic import Int8Dynamic
from cllm_export.exporter.linear import LayerQuantizer, Linear, linear_layers, nodes_of_head
from cllm_export.quantization import BLOCK_SIZES, SCHEMES, Quantization, Scheme

DEFAULT_BLOCK_SIZE = 32
HEAD_KEPT, ASKED = "head: kept unless asked for", "kept as asked"
ROLES = {
    "Gather": "embedding",
    "RMSNormalization": "norm",
    "LayerNormalization": "norm",
    "Add": "bias",
}
"""What a weight is for, by the operator that reads it."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What ``cllm-export build`` lets the user choose of quantisation."""

    scheme: Scheme
    head: bool = False
    """Quantise the head too."""
    block_size: int | None = None
    """Input channels that share a scale of a weight; only where the scheme has blocks, 32 by default."""
    keep: tuple[str, ...] = ()
    """Checkpoint tensors whose layers keep their precision."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise OptionError(f"the scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.block_size is not None:
            require_at_least("block_size", self.block_size, 1)
            if self.scheme != "int4" or self.block_size not in BLOCK_SIZES:
                sizes = ", ".join(map(str, BLOCK_SIZES))
                raise OptionError(
                    f"--quantize-block is for int4 and one of {sizes}, got {self.block_size} for {self.scheme}"
                )

    @property
    def block(self) -> int | None:
        """The block size, settled."""
        return (self.block_size or DEFAULT_BLOCK_SIZE) if self.scheme == "int4" else None


def quantize_options(
    scheme: Scheme | None, *, head: bool = False, block_size: int | None = None, keep: tuple[str, ...] = ()
) -> QuantizeOptions | None:
    """Options of a scheme; None where nothing is quantised.

    Raises:
        OptionError: an option of quantisation was given for nothing to quantise, or is out of range.
    """
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, head=head, block_size=block_size, keep=keep)
    given = {"--quantize-head": head, "--quantize-block": block_size, "--keep": keep}
    if used := next((name for name, value in given.items() if value), None):
        raise OptionError(f"{used} needs a --precision that quantises: {', '.join(SCHEMES)}")
    return None


def quantize(graph: DecoderGraph, options: QuantizeOptions, *, num_layers: int) -> None:
    """Rewrite every linear layer but those that are kept; ``graph.quantization`` says what was done.

    Raises:
        OptionError: a layer to keep is not in the model.
        QuantizationError: no layer is left to quantise, or one cannot be.
        GraphError: a linear layer has a form that no pass of ours leaves.
    """
    linears = list(linear_layers(graph))
    reasons = _reasons(graph, linears, options, num_layers)
    chosen = [linear for linear in linears if linear.name not in reasons]
    if not chosen:
        raise QuantizationError("the graph has no linear layer left to quantise")
    quantizer = _quantizer(graph, options)
    for linear in chosen:
        quantizer.replace(linear)
    quantized = {linear.name for linear in chosen}
    graph.quantization = Quantization(
        scheme=options.scheme,
        method="round to nearest",
        block_size=options.block,
        engines=("onnxruntime",),
        weights=tuple(sorted(quantized)),
        kept={name: reason for name, reason in _kept(graph, reasons).items() if name not in quantized},
    )


def _quantizer(graph: DecoderGraph, options: QuantizeOptions) -> LayerQuantizer:
    if options.block is not None:
        return Int4Blocks(graph, options.block)
    return Int8Dynamic(graph)


def _reasons(graph: DecoderGraph, linears: list[Linear], options: QuantizeOptions, num_layers: int) -> dict[str, str]:
    """Weight of a linear layer that is kept -> why."""
    known = {tensor for linear in linears for tensor in linear.source.tensors}
    if unknown := sorted(set(options.keep) - known):
        raise OptionError(
            f"--keep {unknown[0]} names no linear layer of the model; give a weight's name as the checkpoint has it, "
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
