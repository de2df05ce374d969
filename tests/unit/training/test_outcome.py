"""Whether the tuned model is better or worse than its parent."""

from __future__ import annotations

import pytest

from cllm_export.training.outcome import compare


def entry(speed: float, exact: float, perplexity: float) -> dict[str, float]:
    return {"tokens_per_forward": speed, "exact_match": exact, "perplexity": perplexity}


@pytest.mark.parametrize(
    ("child", "judgement"),
    [
        (entry(2.0, 0.6, 1.5), "better"),
        (entry(2.0, 0.57, 1.55), "better"),
        (entry(1.0, 0.7, 1.5), "better"),
        (entry(1.01, 0.6, 1.5), "equal"),
        (entry(2.0, 0.3, 1.5), "faster, but of lower quality"),
        (entry(2.0, 0.6, 3.0), "faster, but of lower quality"),
        (entry(0.9, 0.7, 1.2), "of higher quality, but slower"),
        (entry(1.0, 0.3, 1.5), "worse"),
        (entry(0.9, 0.6, 1.5), "worse"),
        (entry(1.0, 0.7, 3.0), "worse"),
    ],
)
def test_a_child_is_judged_by_speed_and_quality(child: dict[str, float], judgement: str):
    """Its parent has one token per forward, 60 % exact matches and a perplexity of 1.5."""
    outcome = compare([entry(1.0, 0.6, 1.5), entry(9, 9, 9), child], stopped="done", num_prompts=64)
    assert outcome.judgement == judgement
    assert outcome.sentence.startswith(judgement)


def test_one_sentence_has_the_figures_of_both():
    outcome = compare([entry(1.05, 0.609, 1.523), entry(2.31, 0.625, 1.49)], stopped="done", num_prompts=64)
    assert outcome.sentence == (
        "better than its parent on 64 held-out prompts: tokens per forward 1.05 -> 2.31, "
        "exact match 60.9% -> 62.5%, perplexity 1.52 -> 1.49"
    )


def test_after_a_collapse_the_checkpoint_that_was_written_is_judged():
    outcome = compare([entry(1, 0.6, 1.5), entry(2, 0.6, 1.5), entry(9, 0, 90)], stopped="collapse", num_prompts=64)
    assert outcome.judgement == "better"
