"""The filters of sampling keep the very tokens that transformers' processors keep, in the order of its ``generate``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cllm_export.runtime.decoding.sampling import TOP_P_HEAD, Sampler, Sampling

TEXT, BLOCK = [3, 1, 1, 8], [8, 5, 0]
"""The text ends with the block's first token."""
TEMPERATURES = (1.0, 0.7, 2.5, 1e-6)
TOP_KS = (0, 1, 2, 5, 10_000)
TOP_PS = (1.0, 0.999, 0.9, 0.55, 0.3, 1e-3)
MIN_PS = (0.0, 0.02, 0.3, 0.5, 1.0)
ADJUSTMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "logit_bias": {1: 2.5, 7: -math.inf, 8: -1.0}},
)


def make_rows(generator: np.random.Generator, vocab_size: int) -> np.ndarray:
    """Logits [n, V] for one block, of one kind out of seven."""
    shape = (len(BLOCK), vocab_size)
    kind = generator.integers(7)
    logits = generator.normal(size=shape) * generator.choice([0.01, 1, 4, 30])
    if kind == 1:
        logits = np.round(logits)  # many ties
    elif kind == 2:
        logits[generator.random(shape) < 0.6] = -np.inf
        logits[:, 2] = 0.5
    elif kind == 3:
        logits = np.full(shape, -np.inf)  # one-hot
        logits[np.arange(len(BLOCK)), generator.integers(0, 7, len(BLOCK))] = 3.0
    elif kind == 4:
        logits[:] = generator.normal()  # all equal
    elif kind == 5:
        logits[:, generator.integers(vocab_size)] += 100  # nearly one-hot
    elif kind == 6:
        logits = np.log(generator.dirichlet(np.full(vocab_size, 0.3), len(BLOCK)) + 1e-30)
    return logits.astype(np.float32)


def kept_by_transformers(logits: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Which tokens [n, V] its own list of processors leaves. The filters run in float64, the rest in float32."""
    adjust, filters = LogitsProcessorList(), LogitsProcessorList()
    if bias := options.get("logit_bias"):
        adjust.append(SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if options.get("repetition_penalty"):
        adjust.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    adjust.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        filters.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        filters.append(TopPLogitsWarper(options["top_p"]))
    if options["min_p"]:
        filters.append(MinPLogitsWarper(options["min_p"]))
    kept = []
    for index, row in enumerate(torch.from_numpy(logits.copy())):
        ids = torch.tensor([[*TEXT, *BLOCK[1 : index + 1]]])
        kept.append(filters(ids, adjust(ids, row[None]).double())[0] > -math.inf)
    return torch.stack(kept).numpy()


def kept_by_sampler(logits: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    sampler = Sampler(Sampling(**options), prompt=TEXT, vocab_size=logits.shape[1])
    scores: np.ndarray = sampler.scores(BLOCK, len(TEXT) - 1, logits) > -np.inf
    return scores


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS, ids=lambda given: "+".join(given) or "plain")
def test_every_combination_of_filters_keeps_what_transformers_keeps(temperature: float, adjustment: dict[str, Any]):
    """All values of top-k, top-p and min-p together; ties, infinities, one-hot and flat rows among thousands."""
    generator = np.random.default_rng(17)
    for top_k, top_p, min_p in itertools.product(TOP_KS, TOP_PS, MIN_PS):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, **adjustment}
        logits = make_rows(generator, vocab_size=11)
        expected = kept_by_transformers(logits, options)
        assert np.array_equal(kept_by_sampler(logits, options), expected), (options, logits.tolist())


@pytest.mark.parametrize("top_k", [0, 300, 700])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_large_vocabulary_is_filtered_as_a_small_one(top_k: int, top_p: float):
    """The support of top-p lies within its first look, and beyond it. The kept scores are compared, as torch's sort of
    many equal scores has no order of its own.
    """
    generator = np.random.default_rng(5)
    for scale, digits in itertools.product((0.1, 3.0), (0, 6)):
        logits = np.round(generator.normal(size=(len(BLOCK), 4 * TOP_P_HEAD)) * scale, digits).astype(np.float32)
        options = {"temperature": 0.9, "top_k": top_k, "top_p": top_p, "min_p": 0.01}
        ours, theirs = kept_by_sampler(logits, options), kept_by_transformers(logits, options)
        for row, kept, expected in zip(logits, ours, theirs, strict=True):
            assert np.array_equal(np.sort(row[kept]), np.sort(row[expected])), options


def test_top_p_is_taken_of_what_top_k_left_before_min_p():
    """Of what min-p leaves, the first token alone would reach 0.55."""
    logits = np.log(np.array([[0.4, 0.3, 0.1, 0.1, 0.1, 0, 0, 0, 0]] * 3, np.float32) + 1e-30)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 5, "top_p": 0.55, "min_p": 0.5}
    kept = kept_by_sampler(logits, options)
    assert kept.sum(axis=-1).tolist() == [2, 2, 2]
    assert np.array_equal(kept, kept_by_transformers(logits, options))


def test_an_infinite_logit_takes_all_the_probability():
    """Softmax is not defined there, so transformers has no answer."""
    logits = np.zeros((3, 9), np.float32)
    logits[:, [2, 5]] = np.inf
    kept = kept_by_sampler(logits, {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 4})
    assert np.flatnonzero(kept[0]).tolist() == [2, 5]
