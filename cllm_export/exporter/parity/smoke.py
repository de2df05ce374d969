"""Does a quantised bundle still compute its model? Asked before it takes its place, of every build.

A few forwards through the bundle's graph, layer upon layer with its own errors, against the unquantised weights in
PyTorch: one layer of either in memory at a time. It finds what is broken (scales of another model, a damaged weight,
an outlier that leaves nothing of the rest); how good a sound bundle is, is for prompts to tell, in ``verify``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.quantization import Scheme
from cllm_export.errors import QuantizationError
from cllm_export.exporter.checkpoint.adapter import Adapter
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.exporter.parity.layer_parity import LayeredGraph
from cllm_export.exporter.parity.layer_reference import Float32Array, LayerRecord, LayerReference

MAX_FLIPS: dict[Scheme, float] = {"int8-dynamic": 0.5, "int8": 0.5, "fp8": 0.5, "int4": 0.75}
"""Share of greedy tokens that may differ from the unquantised model's. On random tokens margins are small: sound 8-bit
bundles of tiny random models differ in a fifth of them, 4-bit ones in more than half; a broken layer leaves next to
none alike."""

MAX_DISTANCE = 1.0
"""Root mean square of a layer's error against that of its output: at 1 nothing is left of the model."""

HELD = 4
"""Bytes in fp32, for each byte of a layer in fp32, that the comparison holds: the reference's own, the bundle's, what
both work with."""


@dataclass(frozen=True, kw_only=True)
class Smoke:
    """How far a quantised bundle is from its unquantised model on a few random tokens."""

    tokens: int
    flips: int
    """Greedy tokens that differ."""
    distance: float
    """Root mean square of the error after the last layer, against that of the output."""


def smoke_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Anonymous memory that the comparison takes: that of the largest layer, or of the table."""
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        sizes[layer] = sizes.get(layer, 0) + 4 * int(np.prod(info.shape))
    return HELD * max(sizes.values())


def require_sound(bundle: Bundle, checkpoint: Checkpoint, adapter: Adapter | None, *, threads: int) -> Smoke:
    """Compare a few forwards of the bundle with the checkpoint, merged with its adapter if it has one.

    Raises:
        QuantizationError: a layer's output is not finite or has nothing of the model's left, or too many greedy tokens
            differ; names the first such layer.
    """
    manifest = bundle.manifest
    graph = LayeredGraph(bundle, threads=threads)
    generator = random.Random(0)  # noqa: S311 - test data, not a secret
    token_ids = [generator.randrange(manifest.geometry.vocab_size) for _ in range(sum(graph.block_sizes))]
    hidden: list[Float32Array] = []
    distance = 0.0

    def visit(record: LayerRecord) -> None:
        nonlocal distance
        before = hidden.pop() if hidden else graph.embed(token_ids)
        after = graph.layer(record.layer, token_ids, before)
        distance = _distance(after, record.after)
        if not distance < MAX_DISTANCE:
            raise QuantizationError(_broken(bundle, f"layer {record.layer} is off by {distance:.2g} of its output"))
        hidden.append(after)

    reference = LayerReference(
        checkpoint,
        manifest.precision,
        max_length=manifest.max_length,
        num_layers=manifest.geometry.num_layers,
        adapter=adapter,
    )
    expected = reference.run(token_ids, visit).argmax(axis=-1)
    flips = int(np.sum(graph.head(token_ids, hidden.pop()) != expected))
    assert manifest.quantization is not None
    if flips > MAX_FLIPS[manifest.quantization.scheme] * len(token_ids):
        raise QuantizationError(_broken(bundle, f"{flips} of {len(token_ids)} greedy tokens differ"))
    return Smoke(tokens=len(token_ids), flips=flips, distance=distance)


def _distance(actual: Float32Array, expected: Float32Array) -> float:
    """Infinite where something is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64))) / max(scale, 1e-30))


def _broken(bundle: Bundle, what: str) -> str:
    quantization = bundle.manifest.quantization
    scheme = quantization.scheme if quantization else "unquantised"
    return (
        f"the {scheme} bundle does not compute its model any more: {what} on random tokens; nothing was written. "
        "Use a wider precision, or other scales if it took any"
    )
