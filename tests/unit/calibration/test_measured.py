"""Losses of quality: scores are evidence where an answer is right, else equal texts are compared."""

from __future__ import annotations

import pytest

from cllm_export.calibration.recording import Recording, State
from cllm_export.calibration.search.measured import Measured, Quality, is_evidence, quality_loss, same_text, tpf_loss
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.prompts import Prompt


def measured(*texts: str, answers: tuple[str | None, ...]) -> Measured:
    """A decode that gave these texts. A text is its characters, one a forward."""
    prompts = [Prompt(id=str(index), content="say", answer=answer) for index, answer in enumerate(answers)]
    recordings = [
        Recording(id=prompt.id, prompt=(1,), new=tuple(map(ord, text)), states=(State(0, 1, (1,)),) * len(text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Measured(
        questions=tuple(Question(prompt=prompt) for prompt in prompts), recordings=tuple(recordings), texts=texts
    )


ANSWERS = ("four", "blue")


def test_a_score_of_none_right_in_both_is_no_evidence():
    """Its loss is 0, and says nothing. The texts do: one of two is another."""
    before, after = measured("five", "red", answers=ANSWERS), measured("five", "green", answers=ANSWERS)
    assert quality_loss(before, after) == Quality(0.5, "same_text")
    assert same_text(before, after) == 0.5


@pytest.mark.parametrize(
    ("first", "second", "loss"),
    [(("four", "red"), ("five", "red"), 0.5), (("five", "red"), ("four", "blue"), -1.0), (ANSWERS, ANSWERS, 0.0)],
)
def test_a_score_is_evidence_where_either_has_a_right_answer(first, second, loss):
    found = quality_loss(measured(*first, answers=ANSWERS), measured(*second, answers=ANSWERS))
    assert found == Quality(loss, "exact_match")


def test_without_answers_the_texts_are_compared():
    none = (None, None)
    assert quality_loss(measured("a", "b", answers=none), measured("a", "b", answers=none)) == Quality(0.0, "same_text")


def test_zeros_alone_are_no_evidence():
    assert not is_evidence(0.0, 0.0) and is_evidence(0.0, 0.1)


def test_a_bundle_against_itself_loses_no_tokens_per_forward():
    same = measured("five", "red", answers=ANSWERS)
    assert tpf_loss(same, same) == 0
