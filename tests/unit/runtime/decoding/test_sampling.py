"""Sampling: Jacobi draws what autoregressive decoding draws, and both draw from the right distribution."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.sampling import Sampler, Sampling, gumbel_noise, logprobs_of
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.fakes import HashModel, make_model, properties, write_bundle

VOCABULARY = 200
LOGITS = np.random.default_rng(3).normal(size=(1, 24)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("sampling") / "bundle")


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return make_model(bundle, HashModel(vocab_size=VOCABULARY, window=2))


options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 50]),
        "top_p": st.sampled_from([0.2, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "logit_bias": st.sampled_from([{}, {7: 4.0, 9: -math.inf}]),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@properties
@given(options=options, method=st.sampled_from(["jacobi", "jacobi-block"]), size=st.integers(2, 8))
def test_a_sampled_request_gives_the_same_tokens_by_every_loop(model, options, method, size):
    common = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": 3, **options}
    jacobi = model.generate([5, 9, 3], method=method, block_size=size, **common)
    plain = model.generate([5, 9, 3], method="autoregressive", block_size=size, **common)
    assert jacobi.token_ids == plain.token_ids
    assert jacobi.logprobs == plain.logprobs


def test_sampled_and_greedy_requests_share_a_batch_and_give_what_they_give_alone(bundle):
    def fresh(**slots):
        return make_model(bundle, HashModel(vocab_size=VOCABULARY, window=2), **slots)

    requests = [{"temperature": 0.8 * (index % 3), "seed": index, "max_new_tokens": 20} for index in range(9)]
    with Service(fresh(num_slots=3), block_size=4) as service:
        handles = [service.submit([5 + index, 3], **request) for index, request in enumerate(requests)]
        found = [handle.result().token_ids for handle in handles]
    alone = [fresh().generate([5 + i, 3], block_size=4, **request).token_ids for i, request in enumerate(requests)]
    assert found == alone


def test_a_seed_is_told_and_repeats_a_request_and_another_seed_gives_another_text(model):
    first = model.generate([5], temperature=1.5, max_new_tokens=20, ignore_eos=True)
    again = model.generate([5], temperature=1.5, max_new_tokens=20, ignore_eos=True, seed=first.seed)
    other = model.generate([5], temperature=1.5, max_new_tokens=20, ignore_eos=True)
    assert again.token_ids == first.token_ids
    assert other.seed != first.seed and other.token_ids != first.token_ids


def draws(sampling: dict, count: int) -> Counter[int]:
    """Tokens drawn at ``count`` positions from one and the same distribution."""
    sampler = Sampler(Sampling(**sampling), prompt=[0], vocab_size=LOGITS.shape[1])
    return Counter(sampler.draw([0], 1, position, LOGITS).next_ids[0] for position in range(count))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"temperature": 1.0}, 24),
        ({"temperature": 0.6}, 24),
        ({"temperature": 1.0, "top_k": 5}, 5),
        ({"temperature": 1.5, "top_p": 0.7}, None),
        ({"temperature": 1.0, "min_p": 0.02}, None),
    ],
)
def test_draws_follow_the_softmax_over_the_support(sampling, kept):
    """Chi-square against the softmax computed here by sorting, at the 99.99 % quantile (Wilson-Hilferty)."""
    scores = LOGITS[0].astype(np.float64) / sampling["temperature"]
    order = np.argsort(-scores)
    share = softmax(scores)[order]
    size = kept or (
        int(np.searchsorted(np.cumsum(share), sampling["top_p"])) + 1
        if "top_p" in sampling
        else int((share >= share[0] * sampling["min_p"]).sum())
    )
    expected = dict(zip(order[:size].tolist(), share[:size] / share[:size].sum(), strict=True))
    count = 20_000
    found = draws({**sampling, "seed": 11}, count)
    assert set(found) <= set(expected)
    statistic = sum((found[token] - count * p) ** 2 / (count * p) for token, p in expected.items())
    freedom = size - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_noise_is_a_function_of_seed_and_position_and_has_the_moments_of_a_gumbel():
    noise = gumbel_noise(7, 40, 100_000)
    assert np.array_equal(noise[:50], gumbel_noise(7, 40, 50)), "and not of the vocabulary"
    assert not np.array_equal(noise, gumbel_noise(7, 41, 100_000))
    assert not np.array_equal(noise, gumbel_noise(8, 40, 100_000))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)  # five standard errors of the mean
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.04)
    assert np.isfinite(noise).all()


def test_top_p_reaches_beyond_its_first_look_where_the_distribution_is_flat():
    logits = np.zeros((1, 2000), np.float32)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.5), prompt=[0], vocab_size=2000)
    assert len({sampler.draw([0], 1, at, logits).next_ids[0] for at in range(600)}) > 400, "half of equal tokens stay"


def test_a_row_is_penalised_for_the_text_and_the_draft_up_to_itself():
    logits = np.array([[3.0, 2.9, 2.8, 0.0]] * 3, np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[3], vocab_size=4)
    drawn = sampler.draw([3, 0, 1], 1, 0, logits)
    assert drawn.next_ids == [0, 1, 2]
    assert drawn.num_accepted == 3


def test_log_probabilities_are_those_of_the_model_itself(model):
    row = LOGITS[0]
    found = logprobs_of(row, 4, 3)
    expected = np.log(softmax(row.astype(np.float64)))
    assert found.logprob == pytest.approx(expected[4], abs=1e-9)
    assert [token for token, _ in found.top] == np.argsort(-row)[:3].tolist()
    generation = model.generate([5], logprobs=0, max_new_tokens=5, ignore_eos=True)
    assert generation.logprobs is not None and [entry.token for entry in generation.logprobs] == [*generation.token_ids]
    assert all(entry.top == () and entry.logprob < 0 for entry in generation.logprobs)
    assert model.generate([5], max_new_tokens=5).logprobs is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1}, "temperature must be a number, 0 or 1e-06 to 1e\\+06, got -1"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": 1e-40}, "temperature must be a number, 0 or 1e-06"),
        ({"temperature": 10**400}, "temperature must be a number, 0 or 1e-06"),
        ({"top_k": -1}, "top_k must be an integer of at least 0"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 1e-06 to 1000000"),
        ({"logit_bias": {10**6: 1.0}}, "takes token ids from 0 to [0-9]+, got 1000000"),
        ({"logit_bias": {1: math.nan}}, "must be a number from -1e\\+20 to 1e\\+20, or -inf"),
        ({"logit_bias": {1: 1e39}}, "must be a number from -1e\\+20 to 1e\\+20, or -inf"),
        ({"logit_bias": {1: 10**400}}, "must be a number from -1e\\+20 to 1e\\+20, or -inf"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 2**63}, "seed must be an integer of at most "),
        ({"tempereture": 1.0}, "no such option: tempereture"),
    ],
)
def test_bad_options_are_refused_by_name_and_range(model, wrong, said):
    with pytest.raises(OptionError, match=said):
        model.generate([5], **wrong)


def test_extreme_options_leave_every_score_a_number():
    extreme = {1: 1e20, 2: -1e20, 3: -math.inf}
    for temperature, penalty in ((1e-6, 1e6), (1e-6, 1e-6), (1e6, 1e6)):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty, logit_bias=extreme, top_p=0.9)
        sampler = Sampler(sampling, prompt=[1, 2], vocab_size=5)
        scores = sampler.scores([2], 1, np.array([[1e4, -1e4, 0, 5, -5]], np.float32))
        assert not np.isnan(scores).any()
        assert scores.argmax() == 1
        assert scores.max() < np.inf


def test_a_bias_that_bans_everything_is_refused_and_logits_that_are_nan_are_an_engine_error():
    sampler = Sampler(Sampling(logit_bias=dict.fromkeys(range(4), -math.inf)), prompt=[0], vocab_size=4)
    with pytest.raises(OptionError, match="leave no token"):
        sampler.draw([0], 1, 0, np.zeros((1, 4), np.float32))
    sampler = Sampler(Sampling(temperature=1.0), prompt=[0], vocab_size=4)
    with pytest.raises(EngineError, match="NaN at write index 0"):
        sampler.draw([0], 1, 0, np.full((1, 4), np.nan, np.float32))
