"""What trials of other n cost: forwards of given times, counted, and no clock."""

from __future__ import annotations

import random

import pytest

from cllm_export.runtime.decoding.block_size.auto_sizes import candidate_sizes, settle_sizes
from cllm_export.runtime.decoding.block_size.chooser import DraftRecord, SizeChooser
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.block_size.latency import ForwardTimes
from tests.fakes import PAD, FakeEngine, HashModel, make_geometry

SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
SMOLLM2 = {1: 35.0, 2: 37.0, 4: 40.0, 8: 48.0, 16: 66.0}
"""T(n) of SmolLM2 in fp32 on one thread, in milliseconds."""
STEEPER = {1: 20.3, 2: 24.0, 4: 27.8, 8: 34.5, 16: 46.7}
"""The same on a faster machine."""
TIMES = {"SmolLM2": SMOLLM2, "steeper": STEEPER}


class Text:
    """Decodes tokens with n chosen. ``right`` is the chance that a draft token is right."""

    def __init__(self, times, *, known=None, first=1):
        self._time = ForwardTimes(times).relative
        self._policy = SizeChooser(SIZES, first=first, known_times=known)
        self._record = DraftRecord("drafts")
        self._random = random.Random(0)
        self.sizes = []

    def turn_to(self, kind):
        """Another request begins, with drafts of this kind."""
        self._record = DraftRecord(kind)

    def decode(self, num_tokens, *, right=0.0):
        """Time that so many tokens take, over that of as many forwards of n = 1."""
        spent, made = 0.0, 0
        while made < num_tokens:
            size = self._policy.choose([self._record])
            count = 1
            while count < size and self._random.random() < right:
                count += 1
            self._policy.observe(size, self._time(size), [(self._record, count)])
            self.sizes.append(size)
            spent, made = spent + self._time(size), made + count
        return spent / made / self._time(1)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("knows", [True, False])
def test_an_ordinary_model_is_within_one_percent_of_decoding_without_drafts(times, knows):
    """Its drafts are never right. A short text costs at most 2 %, and from 256 tokens on the loss is below 1 %."""
    known = TIMES[times] if knows else None
    costs = {count: Text(TIMES[times], known=known).decode(count) for count in (64, 256, 1024, 4096)}
    assert 1 < costs[64] <= 1.02
    assert costs[256] <= 1.01
    assert costs[1024] <= 1.007
    assert costs[4096] <= 1.006


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kinds", [(None,), ("others",), (None, "others", None)], ids=["none", "others", "both"])
def test_no_history_lets_drafts_that_never_pay_cost_more(times, kinds):
    """Ten thousand tokens were decoded without drafts, or with drafts of another kind. A text costs what it costs
    first of all."""
    for count, most in ((64, 1.02), (128, 1.015), (256, 1.01)):
        text = Text(TIMES[times], known=TIMES[times])
        for kind in kinds:
            text.turn_to(kind)
            text.decode(10_000)
        text.turn_to("drafts")
        assert 1 < text.decode(count) <= most


def test_times_that_were_taken_on_a_busy_machine_cost_little():
    """The forward of n = 1 was interrupted, so that wide forwards seemed to cost nothing. They are tried one size after
    the other, and a trial ends as soon as it costs too much."""
    text = Text(STEEPER, known={1: 64.0, 2: 64.0})
    assert text.decode(64) <= 1.025
    assert max(text.sizes) <= 4
    assert Text(STEEPER, known={1: 64.0, 2: 64.0}).decode(256) <= 1.0101


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("knows", [True, False])
def test_a_model_with_good_drafts_is_found_out_within_few_tokens(times, knows):
    """Nobody called it a Consistency LLM. Its drafts are right four times in five."""
    text = Text(TIMES[times], known=TIMES[times] if knows else None)
    assert text.decode(32, right=0.8) < 0.85
    assert text.decode(200, right=0.8) < 0.72
    assert text.decode(800, right=0.8) < 0.55


@pytest.mark.parametrize("first", [1, 16])
def test_drafts_that_become_right_in_the_middle_of_a_text_are_found_out(first):
    """A text turns from unpredictable to predictable. Its next 300 tokens take at most two thirds of the time."""
    text = Text(SMOLLM2, first=first)
    text.decode(300)
    assert text.decode(300, right=0.85) < 2 / 3
    assert text.decode(300, right=0.85) < 0.45


def test_requests_without_drafts_run_at_one_however_long():
    """A trial could tell nothing: it has no drafts."""
    policy, record = SizeChooser(SIZES, known_times=SMOLLM2), DraftRecord(None)
    for _ in range(2000):
        size = policy.choose([record])
        assert size == 1
        policy.observe(size, SMOLLM2[size], [(record, 1)])


def test_a_comparison_alone_needs_forwards_before_the_first_request():
    """Every size is known to be exact, so the engine runs nothing: a short request pays for no timing."""
    engine = FakeEngine(HashModel(vocab_size=9, window=2), make_geometry(vocab_size=9))
    candidates = candidate_sizes(engine)
    settle_sizes(
        engine,
        candidates,
        first=1,
        pad_token_id=PAD,
        known_times=None,
        known_sizes=ExactSizes(equal=frozenset(candidates)),
        keep=lambda _: pytest.fail("nothing was compared"),
    )
    assert engine.calls == []


def test_forwards_that_ran_bound_the_times_that_were_known_beforehand():
    """A size of 8 ran and takes six times as long as 1. So 16 cannot take twice as long, whatever a file says."""
    times = ForwardTimes({1: 1.0, 8: 1.5, 16: 2.0})
    for size in (1, 8, 1):
        for _ in range(8):
            times.observe(size, 6.0 if size == 8 else 1.0)
    assert times.relative(8) == times.relative(16) == 6
    assert times.relative(2) <= times.relative(4) <= 6


def test_a_first_spell_is_neither_paid_nor_cut():
    """A tuned model begins with its own size, then 1, then its own again. So its times are known before any choice."""
    text = Text({1: 1.0, 32: 40.0}, first=16)
    text.decode(24)
    assert text.sizes[:24] == [16] * 8 + [1] * 8 + [16] * 8
