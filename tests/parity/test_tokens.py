"""Tokens: the engine's are the checkpoint's, and the loops' are the engine's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import ProposerName
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.drafts.sources import RepeatProposer
from cllm_export.runtime.decoding.jacobi import Autoregressive, SlidingJacobi
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.verification.grammars import check_grammars
from cllm_export.verification.tokens import MARGIN_EPSILON as VERIFY_EPSILON
from tests.checkpoints import EOS, VARIANTS
from tests.conftest import DEMO, PINNED, THREADS, Workshop
from tests.parity.compare import (
    LOGIT_TOLERANCE,
    MARGIN_EPSILON,
    NUM_NEW_TOKENS,
    assert_own_greedy_tokens,
    assert_same_tokens,
    fill_cache,
    fill_slots,
    first_difference,
    random_prompts,
    stock_logits,
    stock_tokens,
)

BLOCK_SIZES = (1, 4, 16)
JACOBI: tuple[Method, ...] = ("jacobi", "jacobi-block")
DEMO_PROMPTS = 4
FIXED: dict[str, dict[str, Any]] = {
    "llama": PINNED,
    "qwen3": {**PINNED, "batch_size": 2},
}
"""Variant -> options of its build with pinned shapes."""


def prompts_for(model: Model) -> list[list[int]]:
    return random_prompts(model.engine.geometry.vocab_size)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_are_those_of_transformers(workshop: Workshop, name: str):
    """What a family does after its head included; the tolerance is LOGIT_TOLERANCE."""
    engine = OrtEngine(workshop.bundle(name), num_slots=2, threads=THREADS)
    [ids] = random_prompts(engine.geometry.vocab_size, [200])
    expected = stock_logits(workshop.stock(name), ids)
    forward = engine.forward(Batch([ids, ids[::-1]], [len(ids), 0], [0, 0]), with_logits=True)
    assert forward.logits is not None
    off = np.abs(forward.logits[0] - expected).max(axis=1)
    first = int(np.argmax(off > LOGIT_TOLERANCE))
    assert off.max() < LOGIT_TOLERANCE, f"{name}: row {first} is the first that is off, the worst by {off.max():.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sampled_request_gives_the_same_tokens_by_every_loop(workshop: Workshop, name: str):
    """Through the same shape equality is required, of tokens and of log-probabilities."""
    model = workshop.model(name)
    for seed, prompt in enumerate(prompts_for(model)):
        common: dict[str, Any] = {
            "seed": seed,
            "temperature": 0.9,
            "top_k": 40,
            "top_p": 0.95,
            "repetition_penalty": 1.2,
        }
        common |= {"max_new_tokens": NUM_NEW_TOKENS, "block_size": 16, "logprobs": 2, "ignore_eos": True}
        expected = model.generate(prompt, method="autoregressive", **common)
        for method in JACOBI:
            found = model.generate(prompt, method=method, **common)
            assert found.token_ids == expected.token_ids
            assert found.logprobs == expected.logprobs


@pytest.mark.parametrize("name", VARIANTS)
def test_autoregressive_decoding_gives_the_tokens_of_transformers_generate(workshop: Workshop, name: str):
    """Across engines a near tie may flip, so equality is required except where the margin is under MARGIN_EPSILON."""
    model, stock, reference = workshop.model(name), workshop.stock(name), workshop.reference(name)
    for prompt in prompts_for(model):
        what = f"{name}, prompt of {len(prompt)}"
        expected = stock_tokens(stock, prompt, NUM_NEW_TOKENS)
        actual = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="autoregressive").token_ids
        assert_own_greedy_tokens(reference, prompt, actual, epsilon=MARGIN_EPSILON, what=what)
        at = first_difference(actual, expected)
        if at is not None:
            margin = reference.predict(prompt, actual[: at + 1])[at].margin
            assert margin < MARGIN_EPSILON, f"{what}: first difference at token {at}, margin {margin:.2g}"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", VARIANTS)
def test_both_jacobi_loops_equal_autoregressive_decoding_at_the_same_block_size(
    workshop: Workshop, name: str, block_size: int
):
    """One engine, one shape: equality is required, with no tolerance."""
    model = workshop.model(name)
    for prompt in prompts_for(model):
        options = {"max_new_tokens": NUM_NEW_TOKENS, "block_size": block_size}
        expected = model.generate(prompt, method="autoregressive", **options)
        for method in JACOBI:
            actual = model.generate(prompt, method=method, **options)
            what = f"{name}, {method}, n = {block_size}, prompt of {len(prompt)}"
            assert_same_tokens(actual.token_ids, expected.token_ids, what)
            assert actual.finish_reason == expected.finish_reason, what


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_vary_so_that_equality_means_something(workshop: Workshop, name: str):
    model = workshop.model(name)
    tokens = [model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS).token_ids for prompt in prompts_for(model)]
    assert len(set(tokens)) > len(tokens) // 2, f"{name} gives the same tokens for most prompts"
    assert len({token for sequence in tokens for token in sequence}) > 20, f"{name} repeats a few tokens"


def test_an_end_of_sequence_id_of_the_generation_config_ends_decoding_inside_a_block(workshop: Workshop):
    model = workshop.model("qwen2")
    stops = VARIANTS["qwen2"].eos
    generations = [model.generate(prompt, block_size=16) for prompt in prompts_for(model)]
    ended = [generation for generation in generations if generation.finish_reason == "eos"]
    assert any(generation.token_ids[-1] != EOS for generation in ended), "only the first id of the list ends decoding"
    for generation in ended:
        found = [token in stops for token in generation.token_ids]
        assert found == [False] * (len(found) - 1) + [True], f"an end of sequence inside {generation.token_ids}"


@pytest.mark.parametrize("proposer", ["pad", "repeat", "prompt"])
@pytest.mark.parametrize("method", JACOBI)
def test_no_proposer_changes_a_token(workshop: Workshop, method: Method, proposer: ProposerName):
    """Any proposer is safe: equality is required."""
    model = workshop.model("llama")
    for prompt in prompts_for(model):
        expected = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="autoregressive", block_size=16)
        actual = model.generate(
            prompt, max_new_tokens=NUM_NEW_TOKENS, method=method, block_size=16, proposer=proposer, seed=len(prompt)
        )
        assert_same_tokens(
            actual.token_ids, expected.token_ids, f"{method}, proposer {proposer}, prompt of {len(prompt)}"
        )


@pytest.mark.parametrize(("name", "options"), [("mistral-window", {}), ("qwen3", FIXED["qwen3"])])
def test_decoding_to_the_last_row_of_the_bundle_stays_lossless(workshop: Workshop, name: str, options: dict[str, Any]):
    """The last blocks reach beyond max_length into the rows the cache has for them: equality is required."""
    model = workshop.model(name, **options)
    max_length = model.facts.max_length
    [prompt] = random_prompts(model.engine.geometry.vocab_size, [200])
    for block_size in (8,) if options else BLOCK_SIZES:
        expected = model.generate(prompt, method="autoregressive", block_size=block_size)
        assert len(expected.token_ids) == max_length - len(prompt)
        for method in JACOBI:
            actual = model.generate(prompt, method=method, block_size=block_size)
            assert_same_tokens(actual.token_ids, expected.token_ids, f"{name}, {method}, n = {block_size}")


def test_the_trained_demo_checkpoint_decodes_losslessly_and_several_tokens_a_forward(workshop: Workshop):
    """Random weights accept next to nothing; a trained CLLM accepts long drafts, so this is where Jacobi is tried.

    The loops are required to be equal; against PyTorch, tokens but for margins under that of ``verify``.
    """
    model, reference = workshop.model("demo"), workshop.reference("demo")
    for prompt in read_prompts(DEMO / "prompts.jsonl", limit=DEMO_PROMPTS):
        ids = model.encode(prompt.content)
        for block_size in BLOCK_SIZES:
            expected = model.generate(ids, method="autoregressive", block_size=block_size)
            what = f"demo, prompt {prompt.id}, n = {block_size}"
            assert_own_greedy_tokens(reference, ids, expected.token_ids, epsilon=VERIFY_EPSILON["fp32"], what=what)
            for method in JACOBI:
                actual = model.generate(ids, method=method, block_size=block_size)
                assert_same_tokens(actual.token_ids, expected.token_ids, f"{what}, {method}")
        taken = model.generate(ids, method="jacobi", block_size=16).statistics
        assert taken.tokens_per_forward > 2, f"prompt {prompt.id}: {taken.tokens_per_forward:.2f} tokens per forward"


@pytest.mark.parametrize(("name", "options"), FIXED.items())
def test_fixed_shapes_give_the_tokens_of_symbolic_shapes(workshop: Workshop, name: str, options: dict[str, int]):
    """Chunks and KV lengths differ, and so may rounding: equal but where the margin is under MARGIN_EPSILON."""
    symbolic, reference = workshop.model(name), workshop.reference(name)
    pinned = workshop.model(name, **options)
    for prompt in prompts_for(symbolic):
        what = f"{name}, {options}, prompt of {len(prompt)}"
        expected = symbolic.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="jacobi", block_size=8).token_ids
        actual = pinned.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="jacobi").token_ids
        assert_own_greedy_tokens(reference, prompt, actual, epsilon=MARGIN_EPSILON, what=what)
        at = first_difference(actual, expected)
        margin = 0.0 if at is None else reference.predict(prompt, actual[: at + 1])[at].margin
        assert margin < MARGIN_EPSILON, f"{what}: first difference at token {at}, margin {margin:.2g}"


@pytest.mark.parametrize("method", ["autoregressive", *JACOBI])
def test_fixed_shapes_decode_losslessly(workshop: Workshop, method: Method):
    """One engine, one shape: equality is required."""
    model = workshop.model("qwen3", **FIXED["qwen3"])
    for prompt in prompts_for(model):
        expected = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method="autoregressive").token_ids
        actual = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, method=method).token_ids
        assert_same_tokens(actual, expected, f"{method}, prompt of {len(prompt)}")


@pytest.mark.parametrize("options", [{}, FIXED["qwen3"]], ids=["symbolic", "fixed"])
def test_two_slots_decode_two_prompts_at_once_as_each_alone(workshop: Workshop, options: dict[str, int]):
    """Slots do not see each other, so at the same B and n equality is required."""
    engine = OrtEngine(workshop.bundle("qwen3", **options), num_slots=2, threads=THREADS)
    prompts = random_prompts(engine.geometry.vocab_size, [37, 150])
    together = _decode_at_once(engine, prompts)
    for slot, prompt in enumerate(prompts):
        fill_cache(engine, 0)
        alone = _decode_at_once(engine, [prompt if other == slot else [0] for other in range(2)], active=(slot,))
        assert_same_tokens(together[slot], alone[slot], f"slot {slot}")


def _decode_at_once(engine: Engine, prompts: list[list[int]], *, active: tuple[int, ...] = (0, 1)) -> list[list[int]]:
    """Sliding Jacobi in slot 0 and autoregressive decoding in slot 1, so that the two move at different paces."""
    write_index = fill_slots(engine, prompts, chunk=8)
    policies = [
        policy(last_token=prompt[-1], write_index=index, proposer=RepeatProposer(prompt))
        for policy, prompt, index in zip((SlidingJacobi, Autoregressive), prompts, write_index, strict=True)
    ]
    tokens: list[list[int]] = [[], []]
    while any(len(tokens[slot]) < NUM_NEW_TOKENS for slot in active):
        running = [slot in active and len(tokens[slot]) < NUM_NEW_TOKENS for slot in (0, 1)]
        blocks = [policy.next_block(8).tokens for policy in policies]
        committed = [int(runs) for runs in running]
        forward = engine.forward(Batch(blocks, committed, [policy.write_index for policy in policies]))
        for slot, policy in enumerate(policies):
            assert (forward.num_accepted[slot] > 0) == running[slot]
            if running[slot]:
                tokens[slot] += policy.commit(forward.next_ids[slot], forward.num_accepted[slot]).tokens
    return [sequence[:NUM_NEW_TOKENS] for sequence in tokens]


@pytest.mark.parametrize("size", [4, 16])
def test_drafts_into_dead_ends_of_grammars_change_nothing_on_the_engine(workshop: Workshop, size: int):
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    with load(workshop.bundle("llama").path, threads=THREADS) as model:
        check = check_grammars(model, [size], lambda *_: None)
    assert check.passed, check.detail
