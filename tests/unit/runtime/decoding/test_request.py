"""What the last forward of a request counts, where the request ends among the tokens that the forward made known."""

from __future__ import annotations

import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.decoding.request import Decode, make_decoder
from cllm_export.runtime.decoding.statistics import summarize
from cllm_export.runtime.engines.base import prefill
from tests.fakes import PAD, FakeEngine, ScriptModel, make_geometry, tokens_of

PROMPT = [5, 6, 7]
SCRIPT = [*range(11, 31)]
SIZE = 4
AHEAD = {"jacobi": 5, "jacobi-block": 4}
"""Tokens known after two forwards: the first finds a draft of padding wrong, the second finds its whole block right."""
LIMIT, EOS, STOP = "limit", "eos", "stop string"


def decode_until(end, kept, *, method="jacobi"):
    """Decode the script until this end leaves ``kept`` tokens of it: the decode and its engine."""
    engine = FakeEngine(ScriptModel(prompt_length=len(PROMPT), script=SCRIPT, window=0), make_geometry())
    decode = Decode(
        make_decoder(method, PROMPT, proposer="pad", seed=0, pad_token_id=PAD),
        max_new_tokens=kept if end == LIMIT else len(SCRIPT),
        eos_token_ids=[SCRIPT[kept - 1]] if end == EOS else [],
        stop_cut=lambda new: new.index(SCRIPT[kept]) if end == STOP and SCRIPT[kept] in new else None,
    )
    prefill(engine, PROMPT[:-1], PAD)
    while decode.finish_reason is None:
        write_index = decode.write_index
        block = decode.next_block(SIZE)
        forward = engine.forward(Batch([block.tokens], [block.num_committed], [write_index]))
        decode.take(forward.next_ids[0], forward.num_accepted[0])
    return decode, engine


@pytest.mark.parametrize("num_lost", [1, 2], ids=["the bonus", "a row"])
@pytest.mark.parametrize("end", [LIMIT, EOS, STOP])
@pytest.mark.parametrize("method", AHEAD)
def test_a_cut_forward_counts_the_rows_of_tokens_that_stay(method, end, num_lost):
    """The bonus is lost first, and is no row of the block: without it all four rows still count."""
    kept = AHEAD[method] - num_lost
    decode, engine = decode_until(end, kept, method=method)
    first, last = decode.records
    assert tokens_of(decode.records) == SCRIPT[:kept]
    assert (first.num_accepted, last.num_accepted) == (1, SIZE - (num_lost - 1))
    text = PROMPT + SCRIPT[:kept]
    assert decode.num_rows == len(text), "every token that stays has its row"
    assert [row.token for row in engine.rows[0][: decode.num_rows]] == text


@pytest.mark.parametrize("method", AHEAD)
def test_a_forward_that_ends_with_its_last_token_counts_whole(method):
    """The bonus stays, and has no row yet."""
    decode, _ = decode_until(LIMIT, AHEAD[method], method=method)
    assert decode.records[-1].num_accepted == SIZE
    assert decode.num_rows == len(PROMPT) + AHEAD[method] - 1


def test_a_stop_string_may_leave_nothing_of_a_forward():
    decode, _ = decode_until(STOP, 1)
    assert decode.records[-1].new == []
    assert decode.records[-1].num_accepted == 1
    assert decode.num_rows == len(PROMPT) + 1


@pytest.mark.parametrize(("num_lost", "matched"), [(0, 3), (1, 3), (2, 2), (3, 1)])
def test_the_histogram_counts_drafts_that_are_in_the_text(num_lost, matched):
    decode, _ = decode_until(LIMIT, AHEAD["jacobi"] - num_lost)
    statistics = summarize(
        decode.records, prompt_tokens=len(PROMPT), prefill_seconds=0, decode_seconds=0, engine_seconds=0
    )
    assert statistics.acceptance_histogram == {0: 1, matched: 1}
