"""Decoding a task's prompts: what is skipped and counted, and the measures of the rest, on a fake engine."""

from __future__ import annotations

import pytest

from cllm_export.errors import OptionError, PromptError
from cllm_export.evaluation.decoding import Settings, decode_prompts, default_settings
from cllm_export.evaluation.measures import measure
from cllm_export.evaluation.verdict import Expectation, judge
from cllm_export.prompts import Prompt
from tests.fakes import HashModel, make_model, write_bundle

SETTINGS = Settings(method="jacobi", block_size=4, proposer="pad", max_new_tokens=12)


@pytest.fixture
def model(tmp_path):
    """Every token depends on the position and the token before it: drafts come right a few at a time."""
    bundle = write_bundle(tmp_path / "bundle", eos_token_ids=())
    return make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2))


def prompts(*contents):
    return [Prompt(id=str(index), content=content) for index, content in enumerate(contents)]


def test_prompts_that_cannot_be_decoded_are_counted_and_not_fatal(model):
    messages = ({"role": "user", "content": "hi"},)
    decoded = decode_prompts(model, prompts("the cat", "", "  \n", "x" * 500, "\ud800", messages, "sat"), SETTINGS)
    assert [answer.index for answer in decoded.answers] == [0, 6]
    assert decoded.skipped == {"empty": 2, "too_long": 1, "not_tokenised": 2}


def test_when_nothing_can_be_decoded_the_first_reason_is_told(model):
    with pytest.raises(PromptError, match=r"none of 2 prompts.*empty"):
        decode_prompts(model, prompts("", ""), SETTINGS)


@pytest.mark.parametrize("method", ["jacobi", "jacobi-block"])
def test_both_loops_equal_autoregressive_decoding_and_their_measures_add_up(model, method):
    settings = Settings(method=method, block_size=4, proposer="repeat", max_new_tokens=12)
    decoded = decode_prompts(model, prompts("the cat", "sat on the mat"), settings)
    measures = measure(decoded.answers, settings)
    assert (measures.exact, measures.compared) == (2, 2)
    assert measures.new_tokens == 24
    assert sum(measures.acceptance_histogram.values()) == measures.forwards
    assert measures.tokens_per_forward == 24 / measures.forwards
    assert measures.finish_reasons == {"length": 2}
    if method == "jacobi":
        assert measures.iterations_per_block == pytest.approx(4 / measures.tokens_per_forward)


def test_a_block_that_is_right_at_once_takes_one_iteration(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", eos_token_ids=())
    free = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=0))
    settings = Settings(method="jacobi-block", block_size=4, proposer="pad", max_new_tokens=8)
    measures = measure(decode_prompts(free, prompts("the cat"), settings).answers, settings)
    assert measures.iterations_per_block == 2.0  # one forward makes it right, one finds it so


def test_a_prompt_that_leaves_little_room_is_decoded_as_far_as_it_goes(model):
    long = "x" * 60
    [answer] = decode_prompts(model, prompts(long), SETTINGS).answers
    assert len(answer.generation.token_ids) == 4


def test_settings_that_the_model_cannot_take_are_refused(model):
    with pytest.raises(OptionError, match="at most 16"):
        decode_prompts(model, prompts("a"), Settings(method="jacobi", block_size=17, proposer="pad", max_new_tokens=1))
    with pytest.raises(OptionError, match="method"):
        Settings(method="autoregressive", block_size=4, proposer="pad", max_new_tokens=1)


def test_the_defaults_are_the_models_own(model):
    assert default_settings(model, max_new_tokens=9) == Settings(
        method="jacobi", block_size=4, proposer="pad", max_new_tokens=9
    )


def expectations(rates, times):
    return [
        Expectation(block_size=n, tokens_per_forward=rate, milliseconds=time, relative=time / times[0])
        for n, rate, time in zip((1, 4, 16), rates, times, strict=True)
    ]


def test_a_model_whose_tokens_per_forward_beat_its_latency_is_ready():
    verdict = judge(expectations((1, 2.5, 5), (1, 1.2, 2)))
    assert (verdict.readiness, verdict.best_block_size, verdict.expected_speedup) == ("ready", 16, 2.5)


def test_an_untuned_model_needs_tuning_and_is_told_how_much():
    verdict = judge(expectations((1, 1.1, 1.2), (1, 1.2, 2)))
    assert verdict.readiness == "needs consistency tuning"
    assert "4.0 tokens per forward to reach 2x" in verdict.advice
    assert "cllm-export tune" in verdict.advice


def test_a_machine_on_which_wide_forwards_cost_as_much_gains_nothing():
    verdict = judge(expectations((1, 3, 10), (1, 3.9, 15)))
    assert verdict.readiness == "this machine gains nothing"


def test_a_machine_too_busy_to_time_forwards_gives_no_verdict_however_good_the_figures_look():
    verdict = judge(expectations((1, 2.5, 5), (1, 1.2, 2)), why_busy="the machine is too busy to tell")
    assert (verdict.readiness, verdict.advice) == ("unknown: machine busy", "the machine is too busy to tell")


def test_what_is_needed_follows_from_the_latency_alone():
    [_, four, _] = expectations((1, 2, 3), (1, 1.5, 4))
    assert four.needed(2.0) == 3.0
    assert four.highest == pytest.approx(4 / 1.5)
