"""Prefix reuse over a real engine: tokens are those of prompts that are read anew, and rows are the same bits.

Equality is required throughout. At one n it rests on a row's bits not depending on its place in the block, which is
tested; across n on the bits not depending on n either, which holds where these tests run, and where it does not,
reuse is as exact as two shapes are to each other.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.checkpoints import PAD
from tests.conftest import DEMO, THREADS, Workshop
from tests.parity.compare import random_prompts

NUM_SLOTS = 4
OPTIONS = {"max_new_tokens": 64}
LENGTH = 200


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Thirty prompts of the demo in the order of their text: those over one schema begin alike, and are neighbours."""
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(json.loads(line)["prompt"] for line in lines)[:30]


def new_model(workshop: Workshop, *, num_slots: int = 1, **options: int) -> Model:
    return load(workshop.bundle("demo").path, threads=THREADS, num_slots=num_slots, **options)


def test_prompts_give_the_tokens_that_they_give_without_a_cache(workshop: Workshop, prompts: list[str]):
    computed, kept = new_model(workshop, prefix_cache_bytes=0), new_model(workshop)
    expected = [computed.generate(prompt, **OPTIONS).token_ids for prompt in prompts]
    for _ in range(2):
        found = [kept.generate(prompt, **OPTIONS) for prompt in prompts]
        assert [entry.token_ids for entry in found] == expected
    assert all(entry.statistics.reused_tokens == entry.statistics.prompt_tokens - 1 for entry in found)


def test_a_service_with_a_cache_gives_in_any_order_what_each_prompt_gives_alone_without_one(
    workshop: Workshop, prompts: list[str]
):
    with Service(new_model(workshop, num_slots=NUM_SLOTS, prefix_cache_bytes=0)) as service:
        expected = [service.submit(prompt, **OPTIONS).result().token_ids for prompt in prompts]
    small = new_model(workshop, num_slots=NUM_SLOTS, prefix_cache_bytes=4 << 20)
    with Service(small) as service:
        for seed in range(2):
            order = random.Random(seed).sample(range(len(prompts)), len(prompts))
            found = service.generate([prompts[index] for index in order], **OPTIONS)
            assert [entry.token_ids for entry in found] == [expected[index] for index in order]
    assert small.prefix_cache is not None
    assert small.prefix_cache.statistics.reused_tokens
    assert small.prefix_cache.statistics.evictions, "the cache must be too small for all of them"


def test_sampled_text_is_that_of_its_seed_with_a_cache_too(workshop: Workshop, prompts: list[str]):
    computed, kept = new_model(workshop, prefix_cache_bytes=0), new_model(workshop)
    for index, prompt in enumerate(prompts[:10]):
        options = {**OPTIONS, "temperature": 0.9, "seed": index, "logprobs": 1}
        expected = computed.generate(prompt, **options)
        for _ in range(2):
            found = kept.generate(prompt, **options)
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)


def test_the_next_turn_reads_what_is_new_and_gives_what_it_gives_read_anew(workshop: Workshop, prompts: list[str]):
    computed, kept = new_model(workshop, prefix_cache_bytes=0), new_model(workshop)
    for prompt, question in zip(prompts[:10], prompts[10:20], strict=True):
        tokens, more = kept.encode(prompt), kept.encode(question)[:20]
        said = kept.generate(tokens, **OPTIONS).token_ids
        following = [*tokens, *said, *more]
        found = kept.generate(following, **OPTIONS)
        assert found.statistics.reused_tokens >= len(tokens) + len(said) - 1
        assert found.token_ids == computed.generate(following, **OPTIONS).token_ids


@pytest.mark.parametrize("method", ["jacobi", "jacobi-block"])
def test_text_that_a_grammar_forced_is_kept_like_any_other(workshop: Workshop, prompts: list[str], method: str):
    computed, kept = new_model(workshop, prefix_cache_bytes=0), new_model(workshop)
    tokens = kept.encode(prompts[0])
    for regex in (r"SELECT COUNT\(\*\) FROM [a-z_]+ WHERE .{5,20}", r"[A-Z]{3} x{30}y[a-z]*"):
        options = {**OPTIONS, "method": method, "regex": regex}
        expected, found = computed.generate(tokens, **options), kept.generate(tokens, **options)
        assert found.token_ids == expected.token_ids
        following = [*tokens, *found.token_ids, *tokens[:9]]
        again = kept.generate(following, **OPTIONS)
        assert again.statistics.reused_tokens >= len(tokens) + len(found.token_ids) - 1
        assert again.token_ids == computed.generate(following, **OPTIONS).token_ids


def test_a_snapshot_gives_what_a_prompt_read_anew_gives(workshop: Workshop, prompts: list[str], tmp_path):
    first, second = new_model(workshop), new_model(workshop)
    for index, prompt in enumerate(prompts[:5]):
        num_tokens = first.save_prefix(tmp_path / str(index), prompt)
        assert second.load_prefix(tmp_path / str(index)) == num_tokens
        expected, found = first.generate(prompt, **OPTIONS), second.generate(prompt, **OPTIONS)
        assert found.statistics.reused_tokens == num_tokens - 1
        assert found.token_ids == expected.token_ids


def read_text(engine: OrtEngine, tokens: list[int], sizes: list[int], *, slot: int = 0, start: int = 0) -> np.ndarray:
    """Read tokens from ``start`` on in forwards of these sizes, in turn; all rows of the slot."""
    position, turn = start, 0
    while position < len(tokens):
        size = sizes[turn % len(sizes)]
        chunk = tokens[position : position + size]
        blocks = [[PAD] * size for _ in range(engine.num_slots)]
        num_committed, write_index = [0] * engine.num_slots, [0] * engine.num_slots
        blocks[slot][: len(chunk)] = chunk
        num_committed[slot], write_index[slot] = len(chunk), position
        engine.forward(Batch(blocks, num_committed, write_index))
        position, turn = position + len(chunk), turn + 1
    return engine.read_rows(slot, 0, len(tokens))


@pytest.mark.parametrize("start", [1, 7, 15, 16, 100, 131])
def test_a_rows_bits_do_not_depend_on_its_place_in_the_block(workshop: Workshop, start: int):
    """Nor on the KV length that the forward reads, which differs as well where blocks start elsewhere."""
    bundle = workshop.bundle("demo")
    [tokens] = random_prompts(bundle.manifest.geometry.vocab_size, [LENGTH])
    expected = read_text(OrtEngine(bundle, num_slots=1, threads=THREADS), tokens, [16])
    engine = OrtEngine(bundle, num_slots=1, threads=THREADS)
    engine.write_rows(0, 0, start, expected[:, :, :start])
    assert np.array_equal(read_text(engine, tokens, [16], start=start), expected)


@pytest.mark.parametrize("sizes", [[16, 3, 1], [1], [64]], ids=["mixed", "one", "64"])
def test_rows_of_other_block_sizes_and_slots_agree(workshop: Workshop, prompts: list[str], sizes: list[int]):
    """They were the same bits where this was written; a processor whose kernels differ by shape may round them apart.

    1e-5 of a tensor's largest value: what ``test_kv_cache.py`` grants between two implementations, halved.
    """
    bundle = workshop.bundle("demo")
    computed = new_model(workshop, prefix_cache_bytes=0)
    engine = OrtEngine(bundle, num_slots=2, threads=THREADS)
    for prompt in prompts[:3]:
        tokens = computed.encode(prompt)[:LENGTH]
        expected = read_text(OrtEngine(bundle, num_slots=1, threads=THREADS), tokens, [16])
        found = read_text(engine, tokens, sizes, slot=1)
        scale = np.abs(expected).max(axis=(1, 2, 3), keepdims=True)
        assert (np.abs(found - expected) <= 1e-5 * scale).all()
