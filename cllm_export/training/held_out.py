"""The held-out set: decodes it with the runtime's loops, to measure quality and tokens per forward during tuning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token
from cllm_export.training.data.cleaning import is_repetitive
from cllm_export.training.data.samples import Sample

ROOM = 16
"""An output may exceed its target by this many tokens. The rest of an endless output says nothing new."""


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """Scores of the held-out set."""

    tokens_per_forward: float
    exact_match: float
    """Share of outputs whose tokens equal those of the target, as far as they were decoded."""
    repetitive: float
    """Share of outputs that repeat a token ten or more times in a row."""

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def held_out_length(samples: Sequence[Sample], *, most_tokens: int, longest: int, block_size: int) -> int:
    """Tokens, prompt included, that a model must hold to decode the samples in blocks. At most ``longest``."""
    needed = (sample.num_prompt + _num_decoded(sample, most_tokens) for sample in samples)
    return min(longest, max(block_size, *needed))


def measure(
    model: Model, samples: Sequence[Sample], *, most_tokens: int, finished: Callable[[int], None] | None = None
) -> HeldOutScore:
    """Decode every sample's prompt with the loop, n and proposer being trained, and compare with its target.

    Args:
        model: a model around the live weights. The slots of its engine decode in parallel.
        most_tokens: new tokens that an answer may have. A longer target is compared up to there.
        finished: called with the number of prompts that are done.
    """
    facts = model.facts
    trained = facts.trained_with
    assert trained is not None, "tuning always says what it trains with"
    limits = [min(_num_decoded(sample, most_tokens), facts.max_length - sample.num_prompt) for sample in samples]
    decodes = decode_requests(
        model.engine,
        [_request(*pair) for pair in zip(samples, limits, strict=True)],
        method=METHOD_OF_LOOP[trained.loop],
        block_size=trained.block_size,
        proposer=trained.proposer,
        eos_token_ids=facts.eos_token_ids,
        pad_token_id=pad_token(facts),
        finished=finished,
    )
    outputs = [[token for record in decode.records for token in record.new] for decode in decodes]
    right = (_is_target(*pair, facts.eos_token_ids, most_tokens) for pair in zip(outputs, samples, strict=True))
    return HeldOutScore(
        tokens_per_forward=sum(map(len, outputs)) / sum(len(decode.records) for decode in decodes),
        exact_match=sum(right) / len(samples),
        repetitive=sum(map(is_repetitive, outputs)) / len(samples),
    )


def _num_decoded(sample: Sample, most_tokens: int) -> int:
    return min(most_tokens, len(sample.tokens) - sample.num_prompt + ROOM)


def _request(sample: Sample, max_new_tokens: int) -> BatchRequest:
    return BatchRequest(prompt=sample.prompt, max_new_tokens=max_new_tokens)


def _is_target(output: Sequence[int], sample: Sample, eos_token_ids: Collection[int], most_tokens: int) -> bool:
    """Whether an output is the target, or as much of it as was decoded.

    It may end with any of the model's end-of-sequence tokens.
    """
    target = sample.tokens[sample.num_prompt : -1]
    if len(output) <= len(target):
        return len(output) == most_tokens and tuple(output) == target[:most_tokens]
    return output[-1] in eos_token_ids and tuple(output[:-1]) == target
