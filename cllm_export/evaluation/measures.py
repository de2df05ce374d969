"""Decoding measures of a set of prompts, from the statistics of each prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cllm_export.evaluation.decoding import Answer, Settings
from cllm_export.runtime.decoding.statistics import ForwardRecord, Statistics


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures summed over prompts. None of them includes prefill."""

    new_tokens: int
    forwards: int
    iterations_per_block: float
    """Block loop: forwards that a block takes to its fixed point. Sliding loop: forwards for n new tokens."""
    fast_forwarded: float
    """Tokens beyond one by which the right prefix grows in a forward, per n new tokens."""
    stationary: float
    """Draft tokens right while an earlier one was wrong that stayed right until accepted, per n new tokens."""
    acceptance_histogram: dict[int, int]
    """m, the draft tokens found right in a forward -> number of forwards."""
    finish_reasons: dict[str, int]
    exact: int
    """Prompts whose tokens equal those of autoregressive decoding at the same n."""
    compared: int

    @property
    def tokens_per_forward(self) -> float:
        """New tokens / decode forwards, including forwards that only confirm a fixed point."""
        return self.new_tokens / self.forwards

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "iterations_per_block": round(self.iterations_per_block, 4),
            "fast_forwarded_per_block": round(self.fast_forwarded, 4),
            "stationary_per_block": round(self.stationary, 4),
            "acceptance_histogram": {str(m): count for m, count in sorted(self.acceptance_histogram.items())},
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "exact": {"equal": self.exact, "of": self.compared},
        }


def measure(answers: Sequence[Answer], settings: Settings) -> Measures:
    """Measures over all answers, of which there must be at least one."""
    statistics = [answer.generation.statistics for answer in answers]
    new_tokens = sum(entry.new_tokens for entry in statistics)
    forwards = sum(entry.forwards for entry in statistics)
    blocks = new_tokens / settings.block_size
    if settings.method == "jacobi-block":
        iterations = forwards / sum(_count_blocks(answer.generation.forwards) for answer in answers)
    else:
        iterations = forwards / blocks
    return Measures(
        new_tokens=new_tokens,
        forwards=forwards,
        iterations_per_block=iterations,
        fast_forwarded=sum(entry.fast_forwarded for entry in statistics) / blocks,
        stationary=sum(entry.stationary for entry in statistics) / blocks,
        acceptance_histogram=dict(_histogram(statistics)),
        finish_reasons=dict(Counter(answer.generation.finish_reason for answer in answers)),
        exact=sum(answer.exact is True for answer in answers),
        compared=sum(answer.exact is not None for answer in answers),
    )


def _count_blocks(forwards: Sequence[ForwardRecord]) -> int:
    return len({record.write_index for record in forwards})


def _histogram(statistics: Sequence[Statistics]) -> Counter[int]:
    histogram: Counter[int] = Counter()
    for entry in statistics:
        histogram.update(entry.acceptance_histogram)
    return histogram
