"""Checks in every build that a quantised bundle still computes its model, before it replaces the old bundle.

A few forwards run through the bundle's graph, layer after layer, so errors accumulate. The result is compared with the
unquantised weights in PyTorch. Each side has one layer in memory at a time. The check finds broken bundles: scales of
another model, a damaged weight, an outlier that destroys all other values. ``verify`` measures on prompts how good a
sound bundle is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import QuantizationError
from cllm_export.exporter.checkpoint.adapter import Adapter
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.exporter.parity.layer_parity import LayeredGraph
from cllm_export.exporter.parity.layer_reference import Float32Array, LayerRecord, LayerReference

MAX_DISTANCE = 1.0
"""Largest ratio of root mean squares, a layer's error to its output. At 1 nothing is left of the model."""

HELD = 4
"""Bytes that the comparison holds for each byte of a layer in fp32. They are the reference's weights, the bundle's
weights, and the working memory of both."""


@dataclass(frozen=True, kw_only=True)
class Smoke:
    """The distance of a quantised bundle from its unquantised model, on a few random tokens."""

    tokens: int
    flips: int
    """Number of greedy tokens that differ."""
    distance: float
    """Root mean square of the error after the last layer, divided by that of the output."""


def smoke_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Anonymous memory that the comparison needs, in bytes, for the largest layer or tensor outside the layers."""
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        sizes[layer] = sizes.get(layer, 0) + 4 * int(np.prod(info.shape))
    return HELD * max(sizes.values())


def require_sound(
    bundle: Bundle, checkpoint: Checkpoint, adapter: Adapter | None, *, max_flips: float, threads: int
) -> Smoke:
    """Compare a few forwards of the bundle with the checkpoint, after any adapter is merged.

    Args:
        max_flips: largest accepted share of greedy tokens that differ from the checkpoint's.

    Raises:
        QuantizationError: a layer's output is not finite or its error reaches ``MAX_DISTANCE`` (names the first such
            layer), or too many greedy tokens differ.
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
    if flips > max_flips * len(token_ids):
        raise QuantizationError(_broken(bundle, f"{flips} of {len(token_ids)} greedy tokens differ"))
    return Smoke(tokens=len(token_ids), flips=flips, distance=distance)


def _distance(actual: Float32Array, expected: Float32Array) -> float:
    """Root mean square of the error, divided by that of ``expected``; infinite if ``actual`` is not finite."""
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
