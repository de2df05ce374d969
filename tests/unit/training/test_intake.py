"""What ``tune`` says before it begins."""

from __future__ import annotations

import pytest

from cllm_export.training.data.samples import Sample
from cllm_export.training.intake import describe_data
from cllm_export.training.options import TuneOptions
from cllm_export.training.prepare import TrainingData


def sample(length: int) -> Sample:
    return Sample(id="1", tokens=(1,) * length, num_prompt=2)


def data(**changes: object) -> TrainingData:
    fields: dict[str, object] = {
        "samples": [sample(100)] * 80,
        "held_out": [sample(100)] * 20,
        "dropped": {},
        "too_long": (),
        "max_length": 256,
        "longest": 2048,
    }
    return TrainingData(**(fields | changes))  # type: ignore[arg-type]


def test_a_run_says_first_what_it_keeps_and_how_long_it_is():
    lines = describe_data(data(), TuneOptions(steps=40, batch_size=8, gradient_accumulation=2), num_processes=2)
    assert lines == [
        "kept 100 of 100 prompts: 80 to train on, 20 to measure on",
        "8,000 tokens to train on, median 100 and at most 100 a sample; 10 steps an epoch, each sample 4 times; "
        "40 steps of training are 4 epochs",
    ]


def test_a_run_by_minutes_has_no_number_of_epochs():
    options = TuneOptions(minutes=30, batch_size=8, objective="autoregressive")
    [_, line] = describe_data(data(), options, num_processes=1)
    assert line.endswith("10 steps an epoch; 30 minutes of training")


def test_too_long_prompts_are_counted_with_the_lengths_that_would_keep_them():
    """Three quarters of a public data set were dropped, which was told at the end."""
    dropped = data(dropped={"too long": 300, "no answer": 4}, too_long=(*[300] * 200, *[700] * 99, 900))
    _, too_long, no_answer, _ = describe_data(dropped, TuneOptions(steps=1), num_processes=1)
    assert too_long == (
        "dropped 300 (74%): too long; they take more than 256 tokens with their answers: max_length=700 keeps 90% of "
        "all, max_length=900 keeps all"
    )
    assert no_answer.startswith("dropped 4 (1%): no answer; give each row an answer")


@pytest.mark.parametrize(
    ("longest", "advice"),
    [
        (256, "more than 256 tokens with their answers, all that the model holds: shorten prompts or answers"),
        (512, "raise max_length=512; the model holds at most 512"),
        (900, "max_length=900 keeps all"),
    ],
)
def test_no_length_is_advised_that_the_model_does_not_hold(longest: int, advice: str):
    dropped = data(dropped={"too long (held out)": 100}, too_long=(900,) * 100, longest=longest)
    [_, line, _] = describe_data(dropped, TuneOptions(steps=1), num_processes=1)
    assert line.endswith(advice)
