"""Quantisation as a pass: chosen linear layers of a finished graph take integers, and the rest stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_export.bundle.quantization import ENGINES, GROUP_SIZES, SCHEMES, Engine, Quantization, Scheme
from cllm_export.bundle.scales import Scales
from cllm_export.bundle.storage import sha256_of
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import OptionError, QuantizationError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.quantize.gptq import Factors
from cllm_export.exporter.quantize.int4 import Int4Groups
from cllm_export.exporter.quantize.int4_dequantize import Int4Dequantize
from cllm_export.exporter.quantize.int8_dynamic import Int8Dynamic
from cllm_export.exporter.quantize.linear import LayerQuantizer, Linear, linear_layers, nodes_of_head
from cllm_export.exporter.quantize.static_layers import FLOAT8, INT8, ColumnMaximum, StaticLayers

DEFAULT_GROUP_SIZE = 32
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


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What ``cllm-export build`` lets the user choose of quantisation."""

    scheme: Scheme
    head: bool = False
    """Quantise the head too."""
    group_size: int | None = None
    """Input channels that share a scale of a weight; only where the scheme has groups, 32 by default."""
    keep: tuple[str, ...] = ()
    """Checkpoint tensors whose layers keep their precision."""
    scales: Path | None = None
    """File of a calibration: int8 and fp8 need one, with one int4 is rounded by GPTQ, int8-dynamic takes none."""
    engine: Engine | None = None
    """Engine that the graph is for, where a scheme has a form for each: int4, by default for ONNX Runtime."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise OptionError(f"the scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.group_size is not None:
            require_at_least("group_size", self.group_size, 1)
            if self.scheme != "int4" or self.group_size not in GROUP_SIZES:
                sizes = ", ".join(map(str, GROUP_SIZES))
                raise OptionError(
                    f"--group-size is for int4 and one of {sizes}, got {self.group_size} for {self.scheme}"
                )

        if self.scheme in STATIC and self.scales is None:
            raise OptionError(
                f"--precision {self.scheme} needs --scales: make them with cllm-export calibrate on the unquantised "
                "bundle"
            )
        if self.scheme == "int8-dynamic" and self.scales is not None:
            raise OptionError("--precision int8-dynamic takes no --scales: activations get theirs at run time")
        if self.engine is not None:
            require_one_of("quantize-for", self.engine, ENGINES)
            if self.scheme != "int4":
                which = (
                    "is for ONNX Runtime alone" if self.scheme == "int8-dynamic" else "is one graph for both engines"
                )
                raise OptionError(f"--quantize-for is for int4: {self.scheme} {which}; leave it out")

    @property
    def is_gptq(self) -> bool:
        return self.scheme == "int4" and self.scales is not None

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines that the graph is for."""
        if self.scheme == "int4":
            return (self.engine or "onnxruntime",)
        return ENGINES if self.scheme in STATIC else ("onnxruntime",)

    @property
    def group(self) -> int | None:
        """The group size, settled."""
        return (self.group_size or DEFAULT_GROUP_SIZE) if self.scheme == "int4" else None


def quantize_options(
    scheme: Scheme | None,
    *,
    head: bool = False,
    group_size: int | None = None,
    keep: tuple[str, ...] = (),
    scales: Path | None = None,
    engine: Engine | None = None,
) -> QuantizeOptions | None:
    """Options of a scheme; None where nothing is quantised.

    Raises:
        OptionError: an option of quantisation was given for nothing to quantise, or is out of range.
    """
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, head=head, group_size=group_size, keep=keep, scales=scales, engine=engine)
    given = {
        "--quantize-head": head,
        "--group-size": group_size,
        "--keep": keep,
        "--scales": scales,
        "--quantize-for": engine,
    }
    if used := next((name for name, value in given.items() if value), None):
        raise OptionError(f"{used} needs a --precision that quantises: {', '.join(SCHEMES)}")
    return None


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
