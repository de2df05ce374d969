"""Measures in every build how far a quantised bundle agrees with its model, before it replaces the old bundle.

Forwards over general text run through the bundle's graph, layer after layer, so errors accumulate. The result is
compared with the unquantised weights in PyTorch. Each side has one layer in memory at a time. A broken bundle is
refused: scales of another model, a damaged weight, an outlier that destroys all other values. So is one that agrees on
fewer tokens than was asked for. ``convergence`` measures the agreement of whole bundles on more text, and on prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.quantization import GOOD_AGREEMENT, Agreement
from cllm_export.errors import QuantizationError
from cllm_export.exporter.checkpoint.adapter import Adapter
from cllm_export.exporter.checkpoint.files import TensorInfo
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.exporter.parity.layer_parity import LayeredGraph
from cllm_export.exporter.parity.layer_reference import Float32Array, LayerRecord, LayerReference
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.general_text import KINDS, general_passages
from cllm_export.runtime.teacher_forced import KNOWN_PERPLEXITY, general_texts, perplexity_of

MAX_DISTANCE = 1.5
"""Largest ratio of root mean squares, a layer's error to its output. At 1.5 nothing is left of the model. A few large
values weigh most in it: a 4-bit bundle of a real model had 1.1, and predicted two tokens of three as the model."""

NUM_TOKENS = 256
"""Tokens of general text that are compared, as many of each kind. An agreement of 90 % is then known within 2 %."""

HELD = 4
"""Bytes that the comparison holds for each byte of a layer in fp32. They are the reference's weights, the bundle's
weights, and the working memory of both."""


def smoke_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Anonymous memory that the comparison needs, in bytes.

    It is that for the largest layer or tensor outside the layers, and the logits of both sides.
    """
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else name
        sizes[layer] = sizes.get(layer, 0) + 4 * int(np.prod(info.shape))
    vocab_size = max(info.shape[0] for name, info in tensors.items() if ".layers." not in name)
    return HELD * max(sizes.values()) + 2 * 4 * NUM_TOKENS * vocab_size


def measure_agreement(
    bundle: Bundle,
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    *,
    least: float,
    threads: int,
    progress: Progress = lambda *_: None,
) -> tuple[Agreement, float]:
    """Compare forwards of the bundle over general text with the checkpoint, after any adapter is merged.

    Returns the agreement, and the checkpoint's perplexity on that text.

    Args:
        least: smallest accepted share of tokens for which the bundle predicts the checkpoint's token.

    Raises:
        QuantizationError: a layer's output is not finite or its error reaches ``MAX_DISTANCE`` (names the first such
            layer), or the agreement is below ``least``.
    """
    manifest = bundle.manifest
    graph = LayeredGraph(bundle, threads=threads, num_tokens=NUM_TOKENS)
    token_ids = general_tokens(bundle, sum(graph.block_sizes))
    hidden: list[Float32Array] = []

    def visit(record: LayerRecord) -> None:
        before = hidden.pop() if hidden else graph.embed(token_ids)
        after = graph.layer(record.layer, token_ids, before)
        distance = _distance(after, record.after)
        if not distance < MAX_DISTANCE:
            raise QuantizationError(_broken(bundle, record.layer, distance))
        hidden.append(after)
        progress("agreement", record.layer + 1, manifest.geometry.num_layers)

    reference = LayerReference(
        checkpoint,
        manifest.precision,
        max_length=manifest.max_length,
        num_layers=manifest.geometry.num_layers,
        adapter=adapter,
    )
    logits = reference.run(token_ids, visit)
    equal = int(np.sum(graph.head(token_ids, hidden.pop()) == logits.argmax(axis=-1)))
    agreement = Agreement(equal=equal, of=len(token_ids))
    if agreement.share < least:
        raise QuantizationError(
            f"the {_scheme(bundle)} bundle predicts the model's own token for only {agreement} tokens of general text, "
            f"and at least {100 * least:g}% are asked for; nothing was written. {ADVICE}, or allow less with "
            "min_agreement",
            fields=("min_agreement",),
        )
    return agreement, perplexity_of(logits[:-1], token_ids[1:])


ADVICE = "Keep layers unquantised with keep='TENSOR' (cllm-export quantize chooses them) or choose a wider precision"


def doubt(agreement: Agreement, perplexity: float) -> str | None:
    """A warning about a bundle that differs from its model more than a good one does; None for a good one.

    Args:
        perplexity: that of the model on the same text.
    """
    if agreement.share >= GOOD_AGREEMENT:
        return None
    measure = "cllm-export convergence measures the agreement on your prompts"
    if perplexity > KNOWN_PERPLEXITY:
        known = f"the model does not know general text (its perplexity is {perplexity:,.0f})"
        return f"{known}, so this says little: {measure}"
    return f"warning: fewer than {GOOD_AGREEMENT:.0%} of the tokens agree. {ADVICE}; {measure}"


def general_tokens(bundle: Bundle, count: int) -> list[int]:
    """The tokens that are compared: general text, one kind after the other, and repeated if there are fewer."""
    codec, each = TextCodec.of_bundle(bundle), max(2, count // len(KINDS))
    texts = general_texts(codec, general_passages(), max_length=each)
    known = [token for text in texts for token in text.tokens if token < bundle.manifest.geometry.vocab_size]
    return list(islice(cycle(known), count))


def _distance(actual: Float32Array, expected: Float32Array) -> float:
    """Root mean square of the error, divided by that of ``expected``; infinite if ``actual`` is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(actual - expected, dtype=np.float64))) / max(scale, 1e-30))


def _scheme(bundle: Bundle) -> str:
    quantization = bundle.manifest.quantization
    return quantization.scheme if quantization else "unquantised"


def _broken(bundle: Bundle, layer: int, distance: float) -> str:
    off = f"is off by {distance:.2g} of its output" if np.isfinite(distance) else "gives values that are not finite"
    return (
        f"the {_scheme(bundle)} bundle does not compute its model any more: layer {layer} {off} on general text; "
        f"nothing was written. {ADVICE}, or give other scales if it took any"
    )
