"""What the parity tests share: seeded prompts, and comparisons that say where and by how much two sides differ."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm_export.bundle.contract import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cllm_export.exporter.parity.reference import Reference
    from cllm_export.runtime.engines.base import Engine
    from cllm_export.runtime.engines.onnxruntime import OrtEngine

PROMPT_LENGTHS = (1, 2, 9, 40, 130, 190)
"""Prefill takes a prompt without its last token, in chunks of 16 for a model this small and of 128 at most: no row,
one, less than a chunk, several chunks, and rows beyond 128. Extents come in steps of 16."""
NUM_NEW_TOKENS = 40

LOGIT_TOLERANCE = 5e-4
"""Largest difference of a logit from PyTorch's in fp32.

Measured over 200 rows of 287 logits, of a spread of 2.5 and up to 12, it is 1e-5 to 1.5e-4: each is a sum of 64
products behind two layers of others, rounded at 6e-8 of terms that cancel. Three times that is left for other CPUs.
"""
MARGIN_EPSILON = 2 * LOGIT_TOLERANCE
"""Top-1 minus top-2 logit in fp32 under which either token is right: one may be too low, the other too high.

Half of all margins here are above 0.5; two of the 2,000 that the tests meet are under epsilon.
"""


def random_prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS, *, seed: int = 0) -> list[list[int]]:
    """Random tokens of these lengths; equal seeds give equal prompts."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    """The first position where two sequences differ, None if they are equal."""
    if list(a) == list(b):
        return None
    shared = min(len(a), len(b))
    return next((index for index in range(shared) if a[index] != b[index]), shared)


def assert_same_tokens(actual: Sequence[int], expected: Sequence[int], what: str) -> None:
    """Require equality; say where the first difference is."""
    at = first_difference(actual, expected)
    if at is not None:
        start = max(0, at - 3)
        raise AssertionError(
            f"{what}: first difference at token {at} of {len(expected)}: "
            f"...{list(actual[start : at + 4])} against ...{list(expected[start : at + 4])}"
        )


def assert_own_greedy_tokens(
    reference: Reference, prompt: Sequence[int], tokens: Sequence[int], *, epsilon: float, what: str
) -> None:
    """Require every token to be what the reference predicts after the tokens before it, but for ties under epsilon."""
    for position, (step, token) in enumerate(zip(reference.predict(prompt, tokens), tokens, strict=True)):
        assert step.token == token or step.margin < epsilon, (
            f"{what}: token {position} is {token}, the reference's is {step.token} with a margin of {step.margin:.2g}"
        )


def stock_tokens(stock: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The greedy tokens that transformers' own ``generate`` gives, with the checkpoint's own end-of-sequence ids."""
    import torch

    ids = torch.tensor([list(prompt)])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_new_tokens}
    return stock.generate(ids, **options)[0, len(prompt) :].tolist()


def stock_cache(stock: PreTrainedModel, prompt: Sequence[int]) -> dict[str, np.ndarray]:
    """Keys and values [1, K, len(prompt), D] of transformers' DynamicCache after the prompt, by past name.

    A cache that is told nothing of the model keeps every row of a layer that slides.
    """
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = stock(torch.tensor([list(prompt)]), past_key_values=DynamicCache(), use_cache=True).past_key_values
    return {
        f"past_{kind}.{index}": rows.numpy()
        for index, layer in enumerate(cache.layers)
        for kind, rows in (("key", layer.keys), ("value", layer.values))
    }


def stock_logits(stock: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """The logits [len(ids), V] of transformers after each token."""
    import torch

    with torch.inference_mode():
        return stock(torch.tensor([list(ids)])).logits[0].numpy()


def read_cache(engine: OrtEngine) -> dict[str, np.ndarray]:
    """A copy of every cache tensor [B, K, C, D], by past name."""
    return {past: engine.read_cache(past) for past in engine.cache_addresses}


def fill_cache(engine: OrtEngine, value: float) -> None:
    """Fill every cache tensor with a number."""
    for past in engine.cache_addresses:
        engine.write_cache(past, value)


def fill_slots(engine: Engine, prompts: Sequence[Sequence[int]], *, chunk: int) -> list[int]:
    """Write every prompt but its last token into its own slot; the write indexes after it.

    A slot that waits is given its own write index, so that what the engine writes for it lies above its valid rows.
    """
    valid = [0] * len(prompts)
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt) - 1, chunk):
            rows = list(prompt[start : min(start + chunk, len(prompt) - 1)])
            blocks = [rows + [0] * (chunk - len(rows))] * len(prompts)
            committed = [len(rows) if other == slot else 0 for other in range(len(prompts))]
            engine.prefill(Batch(blocks, committed, valid))
            valid[slot] += len(rows)
    return valid
