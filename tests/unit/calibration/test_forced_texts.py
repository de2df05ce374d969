"""Which texts count: general text is no evidence of a model that does not know it."""

from __future__ import annotations

import math

import pytest

from cllm_export.calibration.search.forced_texts import Readings
from cllm_export.runtime.teacher_forced import Reading


def readings(general: tuple[int, ...], *, perplexity: float, prompts: tuple[int, ...] = (7, 7)) -> Readings:
    """Predictions, with a perplexity on general text. That on the prompts' texts is 2."""
    return Readings(
        general=(Reading(general, -len(general) * math.log(perplexity)),),
        prompts=(Reading(prompts, -len(prompts) * math.log(2)),),
    )


def test_general_text_counts_if_the_model_knows_it():
    before, after = readings((1, 2), perplexity=10), readings((1, 3), perplexity=11)
    assert before.agreement(after).share == 0.75
    assert before.perplexity_rise(after) == pytest.approx(0.1)
    assert before.compare(after)["known"] == "all"


def test_only_texts_of_the_prompts_count_if_the_model_does_not_know_general_text():
    before, after = readings((1, 2), perplexity=3420), readings((8, 9), perplexity=9000)
    assert before.agreement(after).share == 1
    assert before.perplexity_rise(after) == pytest.approx(0)
    compared = before.compare(after)
    assert compared["known"] == "prompts"
    assert compared["general_agreement"]["share"] == 0
