"""The held-out set: what tuning does to quality and to tokens per forward, by decoding with the runtime's loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cllm_export.bundle import Loop
from cllm_export.runtime.batch import decode_batch
from cllm_export.runtime.generate import Model
from cllm_export.runtime.request import JacobiMethod
from cllm_export.training.samples import Sample

REPEATED = 10
"""Equal tokens in a row that make an output repetitive, as in the CLLM paper's cleaning."""

METHOD_OF_LOOP: dict[Loop, JacobiMethod] = {"sliding": "jacobi", "block": "jacobi-block"}


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """What the held-out set gave."""

    tokens_per_forward: float
    exact_match: float
    """Share of outputs that are the target, token for token."""
    repetitive: float
    """Share of outputs that repeat a token ten times in a row, or never end."""

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure(model: Model, samples: Sequence[Sample], *, block_size: int, max_new_tokens: int) -> HeldOutScore:
    """Decode every sample's prompt and compare with its target.

    Args:
        model: around the live weights; its engine's slots decode side by side.
        max_new_tokens: an output this long counts as never ending.
    """
    facts = model.facts
    trained = facts.trained_with
    assert trained is not None, "tuning always says what it trains with"
    decoded = decode_batch(
        model.engine,
        [sample.tokens[: sample.num_prompt] for sample in samples],
        method=METHOD_OF_LOOP[trained.loop],
        block_size=block_size,
        fill=trained.fill,
        seed=0,
        max_new_tokens=max_new_tokens,
        eos_token_ids=facts.eos_token_ids,
        pad_token_id=facts.pad_token_id or 0,
    )
    outputs = [[token for record in records for token in record.new] for records in decoded]
    new, forwards = sum(map(len, outputs)), sum(map(len, decoded))
    right = sum(
        tuple(output) == sample.tokens[sample.num_prompt :] for output, sample in zip(outputs, samples, strict=True)
    )
    return HeldOutScore(
        tokens_per_forward=new / forwards,
        exact_match=right / len(samples),
        repetitive=sum(map(_is_repetitive, outputs)) / len(samples),
    )


def _is_repetitive(output: Sequence[int]) -> bool:
    run = 1
    for before, token in itertools.pairwise(output):
        run = run + 1 if token == before else 1
        if run >= REPEATED:
            return True
    return False
