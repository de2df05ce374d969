"""Whether the tuned model is better or worse than its parent, by the held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Judgement = Literal["better", "worse", "equal", "faster, but of lower quality", "of higher quality, but slower"]
SPEED_MARGIN = 1.02
"""Factor on tokens per forward below which two models are as fast."""
EXACT_MARGIN = 0.05
"""Difference of exact match up to which two models are equally good: of 64 prompts, three."""
PERPLEXITY_MARGIN = 1.05
"""Factor on perplexity below which two models are equally good."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The comparison of a tuned model with its parent."""

    judgement: Judgement
    sentence: str


def compare(curve: Sequence[Mapping[str, float]], *, stopped: str, num_prompts: int) -> Outcome:
    """Compare the model that a run wrote with the parent, which the first entry of the curve measured.

    Args:
        curve: the held-out decodes of the run, see ``TuneReport``.
        stopped: why the run ended. After a collapse the model of the entry before the last was written.
        num_prompts: number of held-out prompts.
    """
    parent, child = curve[0], curve[-2 if stopped == "collapse" else -1]
    speed = _sign(child["tokens_per_forward"] / parent["tokens_per_forward"], 1 / SPEED_MARGIN, SPEED_MARGIN)
    quality = _quality(parent, child)
    judgement = _judgement(speed, quality)
    return Outcome(
        judgement=judgement,
        sentence=(
            f"{judgement}{' to' if judgement == 'equal' else ', compared with' if ',' in judgement else ' than'} its "
            f"parent on {num_prompts} held-out prompts: tokens per forward {parent['tokens_per_forward']:.2f} -> "
            f"{child['tokens_per_forward']:.2f}, exact match {parent['exact_match']:.1%} -> "
            f"{child['exact_match']:.1%}, perplexity {parent['perplexity']:.3g} -> {child['perplexity']:.3g}"
        ),
    )


def _quality(parent: Mapping[str, float], child: Mapping[str, float]) -> int:
    """1 if the child is better by one measure and no worse by the other, -1 if it is worse by any, else 0."""
    signs = (
        _sign(child["exact_match"] - parent["exact_match"], -EXACT_MARGIN, EXACT_MARGIN),
        -_sign(child["perplexity"] / parent["perplexity"], 1 / PERPLEXITY_MARGIN, PERPLEXITY_MARGIN),
    )
    return -1 if -1 in signs else max(signs)


def _judgement(speed: int, quality: int) -> Judgement:
    if speed > 0 > quality:
        return "faster, but of lower quality"
    if quality > 0 > speed:
        return "of higher quality, but slower"
    total = speed + quality
    return "better" if total > 0 else "worse" if total < 0 else "equal"


def _sign(value: float, low: float, high: float) -> int:
    return 1 if value > high else -1 if value < low else 0
