"""Fills: what they guess, that they are seeded, and that no other name passes."""

from __future__ import annotations

import pytest

from cllm_export.bundle import FILLS
from cllm_export.errors import OptionError
from cllm_export.runtime.draft import LookupFill, PadFill, PromptFill, RepeatFill, make_fill

PROMPT = [4, 5, 6]
KINDS = {"pad": PadFill, "repeat": RepeatFill, "prompt": PromptFill, "lookup": LookupFill}


def test_the_pad_fill_repeats_its_token():
    assert PadFill(7).guess(3, ()) == [7, 7, 7]


def test_the_repeat_fill_repeats_the_last_token_of_draft_or_text():
    fill = RepeatFill(PROMPT)
    assert fill.guess(3, ()) == [6, 6, 6]
    assert fill.guess(3, [9]) == [9, 9, 9]
    fill.accept([7, 8])
    assert fill.guess(2, ()) == [8, 8]


def test_the_prompt_fill_guesses_tokens_of_the_prompt():
    assert set(PromptFill(PROMPT, seed=0).guess(100, ())) == set(PROMPT)


def test_the_prompt_fill_repeats_itself_for_the_same_seed_only():
    first, again, other = (PromptFill(PROMPT, seed).guess(20, ()) for seed in (1, 1, 2))
    assert first == again != other


def test_the_prompt_fill_guesses_anew_each_time():
    fill = PromptFill(PROMPT, seed=0)
    assert fill.guess(20, ()) != fill.guess(20, ())


@pytest.mark.parametrize("name", FILLS)
def test_a_fill_of_no_tokens_is_empty(name):
    assert make_fill(name, prompt=PROMPT, pad_token_id=0, seed=0).guess(0, ()) == []


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_name_makes_its_own_fill(name, kind):
    assert type(make_fill(name, prompt=PROMPT, pad_token_id=0, seed=0)) is kind


def test_an_unknown_fill_is_refused_with_the_names_there_are():
    with pytest.raises(OptionError, match="fill must be one of pad, repeat, prompt, lookup, got 'random'"):
        make_fill("random", prompt=PROMPT, pad_token_id=0, seed=0)


def test_lookup_goes_on_as_the_longest_matching_end_last_did():
    fill = LookupFill([1, 2, 3, 4, 9, 3, 8, 1, 2, 3], pad=0)
    assert fill.guess(4, ()) == [4, 9, 3, 8]  # [1, 2, 3] stood before; [3] alone stood later, before 8


def test_lookup_prefers_the_latest_of_equal_matches():
    assert LookupFill([3, 4, 5, 3, 6, 7, 3], pad=0).guess(2, ()) == [6, 7]


def test_lookup_matches_what_the_draft_ends_with():
    fill = LookupFill([1, 2, 3, 4, 5], pad=0)
    assert fill.guess(3, ()) == [0, 0, 0]
    assert fill.guess(2, [2]) == [3, 4]
    assert fill.guess(2, [9, 2, 3]) == [4, 5]


def test_lookup_learns_from_what_is_accepted():
    fill = LookupFill([1, 2], pad=0)
    fill.accept([3, 1])
    assert fill.guess(2, ()) == [2, 3]
    fill.accept([2])
    assert fill.guess(2, ()) == [3, 1]


def test_lookup_expects_a_repetition_to_go_on():
    assert LookupFill([5, 1, 2, 1, 2], pad=0).guess(5, ()) == [1, 2, 1, 2, 1]
    assert LookupFill([5, 7, 7], pad=0).guess(3, ()) == [7, 7, 7]


def test_lookup_in_the_text_of_one_token_guesses_the_pad_token():
    assert LookupFill([5], pad=3).guess(2, ()) == [3, 3]
