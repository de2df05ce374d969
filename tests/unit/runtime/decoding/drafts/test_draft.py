"""Fills: what they guess, that they are seeded, and that no other name passes."""

from __future__ import annotations

import pytest

from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import (
    ALWAYS_KNOW,
    SOURCES,
    LookupFill,
    ModelFill,
    PadFill,
    PromptFill,
    RepeatFill,
    make_fill,
    parse_fill,
)

PROMPT = [4, 5, 6]
KINDS = {"pad": PadFill, "repeat": RepeatFill, "prompt": PromptFill}


def make(fill, prompt=PROMPT, **options):
    return make_fill(fill, prompt=prompt, pad_token_id=0, seed=0, pool=NgramPool(), **options)


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


@pytest.mark.parametrize("name", SOURCES)
def test_a_fill_of_no_tokens_is_empty(name):
    assert make(name).guess(0, ()) == []


@pytest.mark.parametrize("name", [*SOURCES, "pool+lookup", "model+pool+repeat"])
def test_a_fill_always_guesses_as_many_tokens_as_it_is_asked_for(name):
    fill = make(name)
    for count in (1, 2, 9):
        assert len(fill.guess(count, ())) == len(fill.guess(count, [8, 9])) == count


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_name_makes_its_own_fill(name, kind):
    assert type(make_fill(name, prompt=PROMPT, pad_token_id=0, seed=0)) is kind


def test_an_unknown_fill_is_refused_with_the_names_there_are():
    names = "pad, repeat, prompt, lookup, pool, model, or several joined by \\+"
    with pytest.raises(OptionError, match=f"fill must be one of {names}, got 'random'"):
        make("random")
    with pytest.raises(OptionError, match="got 'random'"):
        make("pool+random")
    for empty in ("", "pool+", "+pad"):
        with pytest.raises(OptionError, match="got ''"):
            make(empty)
    with pytest.raises(OptionError, match="got 7"):
        make(7)


def test_a_chain_names_no_source_twice_and_none_that_is_never_asked():
    with pytest.raises(OptionError, match="fill names lookup twice: 'lookup\\+pad\\+lookup'"):
        make("lookup+pad+lookup")
    with pytest.raises(OptionError, match="repeat always knows, so what follows it is never asked"):
        make("repeat+lookup")


@pytest.mark.parametrize("last", ALWAYS_KNOW)
def test_a_chain_ends_with_a_source_that_always_knows_which_is_pad_unless_it_says_otherwise(last):
    assert parse_fill(f"pool+{last}") == ("pool", last)
    assert parse_fill("pool+lookup") == ("pool", "lookup", "pad")


def test_a_pool_is_needed_where_one_is_named():
    with pytest.raises(OptionError, match="fill pool needs a pool that requests share"):
        make_fill("lookup+pool", prompt=PROMPT, pad_token_id=0, seed=0)


def test_each_source_of_a_chain_goes_on_where_the_one_before_it_knows_no_more():
    pool = NgramPool(max_key=1)
    pool.learn([6, 20, 21, 4], 1)  # the pool knows 6 -> 20 -> 21 -> 4, then nothing
    chain = make_fill("pool+lookup+repeat", prompt=PROMPT, pad_token_id=0, seed=0, pool=pool)
    assert chain.guess(2, ()) == [20, 21]
    assert chain.guess(5, ()) == [20, 21, 4, 5, 6]
    assert chain.guess(2, [9]) == [9, 9], "nobody knows what follows 9"


def test_every_source_of_a_chain_learns_what_is_accepted():
    chain = make("lookup+repeat", [1, 2])
    chain.accept([3, 1])
    assert chain.guess(2, ()) == [2, 3]
    chain.accept([8])
    assert chain.guess(2, ()) == [8, 8]


def test_a_draft_model_is_asked_for_what_the_sources_before_it_do_not_know():
    pool = NgramPool(max_key=1)
    pool.learn([6, 20, 21], 1)
    chain = make_fill("pool+model", prompt=PROMPT, pad_token_id=0, seed=0, pool=pool)
    wish = chain.wish(5, ())
    assert (wish.tokens, wish.count) == ([4, 5, 6, 20, 21], 3)
    wish.found = [30, 31]
    assert chain.guess(5, ()) == [20, 21, 30, 31, 0]
    assert chain.wish(2, ()) is None, "the pool knows them all"
    chain.accept([20])
    assert chain.guess(3, [21]) == [0, 0, 0], "an answer holds for the text it was asked for"


def test_an_answer_of_a_draft_model_holds_for_the_draft_it_was_asked_for():
    fill = ModelFill(PROMPT)
    assert fill.guess(2, ()) == [], "nobody has asked"
    fill.wish(3, [9]).found = [30, 31]
    assert fill.guess(3, [9]) == [30, 31]
    assert fill.guess(1, [9]) == [30]
    assert fill.guess(3, [8]) == fill.guess(3, ()) == []


def test_lookup_goes_on_as_the_longest_matching_end_last_did():
    fill = LookupFill([1, 2, 3, 4, 9, 3, 8, 1, 2, 3])
    assert fill.guess(4, ()) == [4, 9, 3, 8]  # [1, 2, 3] stood before; [3] alone stood later, before 8


def test_lookup_prefers_the_latest_of_equal_matches():
    assert LookupFill([3, 4, 5, 3, 6, 7, 3]).guess(2, ()) == [6, 7]


def test_lookup_matches_what_the_draft_ends_with():
    fill = LookupFill([1, 2, 3, 4, 5])
    assert fill.guess(3, ()) == []
    assert fill.guess(2, [2]) == [3, 4]
    assert fill.guess(2, [9, 2, 3]) == [4, 5]


def test_lookup_learns_from_what_is_accepted():
    fill = LookupFill([1, 2])
    fill.accept([3, 1])
    assert fill.guess(2, ()) == [2, 3]
    fill.accept([2])
    assert fill.guess(2, ()) == [3, 1]


def test_lookup_expects_a_repetition_to_go_on():
    assert LookupFill([5, 1, 2, 1, 2]).guess(5, ()) == [1, 2, 1, 2, 1]
    assert LookupFill([5, 7, 7]).guess(3, ()) == [7, 7, 7]


def test_lookup_in_the_text_of_one_token_knows_nothing():
    assert LookupFill([5]).guess(2, ()) == []
