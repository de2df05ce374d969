"""Proposers: what they guess, that they are seeded, and that no other name passes."""

from __future__ import annotations

import pytest

from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import (
    ALWAYS_KNOW,
    SOURCES,
    DraftModelProposer,
    LookupProposer,
    PadProposer,
    PromptProposer,
    RepeatProposer,
    make_proposer,
    parse_proposers,
)

PROMPT = [4, 5, 6]
KINDS = {"pad": PadProposer, "repeat": RepeatProposer, "prompt": PromptProposer}


def make(proposer, prompt=PROMPT, **options):
    return make_proposer(proposer, prompt=prompt, pad_token_id=0, seed=0, pool=NgramPool(), **options)


def test_the_pad_proposer_repeats_its_token():
    assert PadProposer(7).propose(3, ()) == [7, 7, 7]


def test_the_repeat_proposer_repeats_the_last_token_of_draft_or_text():
    proposer = RepeatProposer(PROMPT)
    assert proposer.propose(3, ()) == [6, 6, 6]
    assert proposer.propose(3, [9]) == [9, 9, 9]
    proposer.accept([7, 8])
    assert proposer.propose(2, ()) == [8, 8]


def test_the_prompt_proposer_guesses_tokens_of_the_prompt():
    assert set(PromptProposer(PROMPT, seed=0).propose(100, ())) == set(PROMPT)


def test_the_prompt_proposer_repeats_itself_for_the_same_seed_only():
    first, again, other = (PromptProposer(PROMPT, seed).propose(20, ()) for seed in (1, 1, 2))
    assert first == again != other


def test_the_prompt_proposer_guesses_anew_each_time():
    proposer = PromptProposer(PROMPT, seed=0)
    assert proposer.propose(20, ()) != proposer.propose(20, ())


@pytest.mark.parametrize("name", SOURCES)
def test_a_proposer_of_no_tokens_is_empty(name):
    assert make(name).propose(0, ()) == []


@pytest.mark.parametrize("name", [*SOURCES, "pool+lookup", "model+pool+repeat"])
def test_a_proposer_always_guesses_as_many_tokens_as_it_is_asked_for(name):
    proposer = make(name)
    for count in (1, 2, 9):
        assert len(proposer.propose(count, ())) == len(proposer.propose(count, [8, 9])) == count


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_name_makes_its_own_proposer(name, kind):
    assert type(make_proposer(name, prompt=PROMPT, pad_token_id=0, seed=0)) is kind


def test_an_unknown_proposer_is_refused_with_the_names_there_are():
    names = "pad, repeat, prompt, lookup, pool, model, or several joined by \\+"
    with pytest.raises(OptionError, match=f"proposer must be one of {names}, got 'random'"):
        make("random")
    with pytest.raises(OptionError, match="got 'random'"):
        make("pool+random")
    for empty in ("", "pool+", "+pad"):
        with pytest.raises(OptionError, match="got ''"):
            make(empty)
    with pytest.raises(OptionError, match="got 7"):
        make(7)


def test_a_chain_names_no_source_twice_and_none_that_is_never_asked():
    with pytest.raises(OptionError, match="proposer names lookup twice: 'lookup\\+pad\\+lookup'"):
        make("lookup+pad+lookup")
    with pytest.raises(OptionError, match="repeat always knows, so what follows it is never asked"):
        make("repeat+lookup")


@pytest.mark.parametrize("last", ALWAYS_KNOW)
def test_a_chain_ends_with_a_source_that_always_knows_which_is_pad_unless_it_says_otherwise(last):
    assert parse_proposers(f"pool+{last}") == ("pool", last)
    assert parse_proposers("pool+lookup") == ("pool", "lookup", "pad")


def test_a_pool_is_needed_where_one_is_named():
    with pytest.raises(OptionError, match="proposer pool needs a pool that requests share"):
        make_proposer("lookup+pool", prompt=PROMPT, pad_token_id=0, seed=0)


def test_each_source_of_a_chain_goes_on_where_the_one_before_it_knows_no_more():
    pool = NgramPool(max_key=1)
    pool.learn([6, 20, 21, 4], 1)  # the pool knows 6 -> 20 -> 21 -> 4, then nothing
    chain = make_proposer("pool+lookup+repeat", prompt=PROMPT, pad_token_id=0, seed=0, pool=pool)
    assert chain.propose(2, ()) == [20, 21]
    assert chain.propose(5, ()) == [20, 21, 4, 5, 6]
    assert chain.propose(2, [9]) == [9, 9], "nobody knows what follows 9"


def test_every_source_of_a_chain_learns_what_is_accepted():
    chain = make("lookup+repeat", [1, 2])
    chain.accept([3, 1])
    assert chain.propose(2, ()) == [2, 3]
    chain.accept([8])
    assert chain.propose(2, ()) == [8, 8]


def test_a_draft_model_is_asked_for_what_the_sources_before_it_do_not_know():
    pool = NgramPool(max_key=1)
    pool.learn([6, 20, 21], 1)
    chain = make_proposer("pool+model", prompt=PROMPT, pad_token_id=0, seed=0, pool=pool)
    request_draft = chain.request_draft(5, ())
    assert (request_draft.tokens, request_draft.count) == ([4, 5, 6, 20, 21], 3)
    request_draft.found = [30, 31]
    assert chain.propose(5, ()) == [20, 21, 30, 31, 0]
    assert chain.request_draft(2, ()) is None, "the pool knows them all"
    chain.accept([20])
    assert chain.propose(3, [21]) == [0, 0, 0], "an answer holds for the text it was asked for"


def test_an_answer_of_a_draft_model_holds_for_the_draft_it_was_asked_for():
    proposer = DraftModelProposer(PROMPT)
    assert proposer.propose(2, ()) == [], "nobody has asked"
    proposer.request_draft(3, [9]).found = [30, 31]
    assert proposer.propose(3, [9]) == [30, 31]
    assert proposer.propose(1, [9]) == [30]
    assert proposer.propose(3, [8]) == proposer.propose(3, ()) == []


def test_lookup_goes_on_as_the_longest_matching_end_last_did():
    proposer = LookupProposer([1, 2, 3, 4, 9, 3, 8, 1, 2, 3])
    assert proposer.propose(4, ()) == [4, 9, 3, 8]  # [1, 2, 3] stood before; [3] alone stood later, before 8


def test_lookup_prefers_the_latest_of_equal_matches():
    assert LookupProposer([3, 4, 5, 3, 6, 7, 3]).propose(2, ()) == [6, 7]


def test_lookup_matches_what_the_draft_ends_with():
    proposer = LookupProposer([1, 2, 3, 4, 5])
    assert proposer.propose(3, ()) == []
    assert proposer.propose(2, [2]) == [3, 4]
    assert proposer.propose(2, [9, 2, 3]) == [4, 5]


def test_lookup_learns_from_what_is_accepted():
    proposer = LookupProposer([1, 2])
    proposer.accept([3, 1])
    assert proposer.propose(2, ()) == [2, 3]
    proposer.accept([2])
    assert proposer.propose(2, ()) == [3, 1]


def test_lookup_expects_a_repetition_to_go_on():
    assert LookupProposer([5, 1, 2, 1, 2]).propose(5, ()) == [1, 2, 1, 2, 1]
    assert LookupProposer([5, 7, 7]).propose(3, ()) == [7, 7, 7]


def test_lookup_in_the_text_of_one_token_knows_nothing():
    assert LookupProposer([5]).propose(2, ()) == []
