"""Fills: what they guess, that they are seeded, and that no other name passes."""

from __future__ import annotations

import pytest

from cllm_export.errors import OptionError
from cllm_export.runtime.draft import PadFill, PromptFill, RepeatFill, make_fill

PROMPT = [4, 5, 6]


def test_the_pad_fill_repeats_its_token():
    assert PadFill(7)(3, last=5) == [7, 7, 7]


def test_the_repeat_fill_repeats_the_last_token():
    assert RepeatFill()(3, last=5) == [5, 5, 5]


def test_the_prompt_fill_guesses_tokens_of_the_prompt():
    assert set(PromptFill(PROMPT, seed=0)(100, last=1)) == set(PROMPT)


def test_the_prompt_fill_repeats_itself_for_the_same_seed_only():
    first, again, other = (PromptFill(PROMPT, seed)(20, last=1) for seed in (1, 1, 2))
    assert first == again != other


def test_the_prompt_fill_guesses_anew_each_time():
    fill = PromptFill(PROMPT, seed=0)
    assert fill(20, last=1) != fill(20, last=1)


@pytest.mark.parametrize("name", ["pad", "repeat", "prompt"])
def test_a_fill_of_no_tokens_is_empty(name):
    assert make_fill(name, prompt=PROMPT, pad_token_id=0, seed=0)(0, 1) == []


@pytest.mark.parametrize(("name", "kind"), [("pad", PadFill), ("repeat", RepeatFill), ("prompt", PromptFill)])
def test_every_name_makes_its_own_fill(name, kind):
    assert type(make_fill(name, prompt=PROMPT, pad_token_id=0, seed=0)) is kind


def test_an_unknown_fill_is_refused_with_the_names_there_are():
    with pytest.raises(OptionError, match="fill must be one of pad, repeat, prompt, got 'random'"):
        make_fill("random", prompt=PROMPT, pad_token_id=0, seed=0)
