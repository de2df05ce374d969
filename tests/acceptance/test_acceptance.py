"""What every engine must do, on whatever device: run by ``make test-gpu`` where there is a GPU.

The suite is written against the ``Engine`` protocol, so that the CPU engine, which runs everywhere, proves the suite.
Through one engine and one shape equality is required; across engines tokens may differ where the CPU engine's own
margin between its two best tokens is within the tolerance of the precision.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import Bundle
from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine, Forward
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from tests.acceptance.subjects import BLOCK_SIZES, KINDS, Kind, Subject, open_kind
from tests.conftest import THREADS, Workshop
from tests.fakes import PAD

LOGIT_TOLERANCE = 5e-3
"""Largest difference of an fp32 logit from the CPU engine's, in standard deviations of the logits.

Both compute in fp32 (a plan's TF32 is off): sums of some hundred products in another order, rounded at 6e-8, through a
few layers differ by 1e-4 at most on these models, as PyTorch and ONNX Runtime do. A wrong row, scale or mask shows from
1e-1 on; fifty times the noise leaves room for kernels that reorder more.
"""
BATCH_SIZES = (1, 8)
CHUNK = 16
"""Tokens of the prompt that every engine takes at once."""
ENDURANCE_TOKENS = 10_000
MEMORY_SLACK = 16 << 20
"""Bytes that the CUDA context itself may keep after the first engine of a process."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return open_kind(request.param, tmp_path)


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


@pytest.fixture(params=BATCH_SIZES)
def subject(request: pytest.FixtureRequest, kind: Kind, bundle: Bundle) -> Iterator[Subject]:
    opened = kind.open(bundle, request.param)
    yield opened
    opened.close()


@pytest.fixture
def single(kind: Kind, bundle: Bundle) -> Iterator[Subject]:
    opened = kind.open(bundle, 1)
    yield opened
    opened.close()


def random_blocks(engine: Engine, size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    vocabulary = engine.geometry.vocab_size
    return [[generator.randrange(vocabulary) for _ in range(size)] for _ in range(engine.num_slots)]


def run(engine: Engine, size: int, *, seed: int = 0) -> tuple[Forward, list[int]]:
    """One forward of random blocks after a chunk of the prompt, every other slot a row behind; and where it wrote."""
    slots = engine.num_slots
    engine.prefill(Batch(random_blocks(engine, CHUNK, seed), [CHUNK] * slots, [0] * slots))
    write_index = [CHUNK - slot % 2 for slot in range(slots)]
    return engine.forward(
        Batch(random_blocks(engine, size, seed + 1), [1] * slots, write_index), with_logits=True
    ), write_index


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_row_has_the_same_bits_at_every_position_of_the_block_and_in_every_slot(subject: Subject, size: int):
    """Identical rows of one forward may differ where a kernel treats rows by their place.

    The text is read by blocks of n, and its last token is moved through the block: the same token, at the same position
    of the text, over the same cache. Every slot has the same text. Logits, KV and predictions must not know the place.
    """
    engine, slots = subject.engine, subject.engine.num_slots
    generator = random.Random(size)
    text = [generator.randrange(engine.geometry.vocab_size) for _ in range(2 * size + 1 + size)]
    at = 2 * size
    found = set()
    for place in range(size):
        first = at - place
        for start in [*range(0, first, size), first]:
            forward = engine.forward(
                Batch([text[start : start + size]] * slots, [1] * slots, [start] * slots), with_logits=True
            )
        assert forward.logits is not None
        for slot in range(slots):
            kv = engine.read_rows(slot, at, at + 1).tobytes()
            found.add((forward.logits[slot, place].tobytes(), kv, forward.next_ids[slot][place]))
    assert len(found) == 1, f"n = {size}: one row has {len(found)} different results"


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_logits_are_the_cpu_engines_within_tolerance_and_tokens_by_margin(subject: Subject, bundle: Bundle, size: int):
    reference = OrtEngine(bundle, num_slots=subject.engine.num_slots, threads=THREADS)
    (given, _), (expected, _) = run(subject.engine, size), run(reference, size)
    assert given.logits is not None
    assert expected.logits is not None
    spread = expected.logits.std()
    worst = np.abs(given.logits - expected.logits).max() / spread
    assert worst < LOGIT_TOLERANCE, f"n = {size}: a logit is off by {worst:.1e} standard deviations"
    for slot, (mine, other) in enumerate(zip(given.next_ids, expected.next_ids, strict=True)):
        for row in (row for row in range(size) if mine[row] != other[row]):
            logits = expected.logits[slot, row]
            margin = (logits[other[row]] - logits[mine[row]]) / spread
            assert margin < 2 * LOGIT_TOLERANCE, f"slot {slot}, row {row}: {mine[row]} for {other[row]}, {margin:.1e}"


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_jacobi_decoding_gives_autoregressive_tokens_exactly(subject: Subject, size: int):
    """Same engine, same shape: equality is required for every prompt."""
    engine = subject.engine
    prompts = [block[: 3 + index] for index, block in enumerate(random_blocks(engine, 40, 7))]
    tokens = {method: decode(engine, prompts, method, size) for method in ("jacobi", "jacobi-block", "autoregressive")}
    assert tokens["jacobi"] == tokens["autoregressive"]
    assert tokens["jacobi-block"] == tokens["autoregressive"]


def decode(engine: Engine, prompts: list[list[int]], method: Method, size: int, *, count: int = 16) -> list[list[int]]:
    """New tokens of each prompt. Blocks smaller than the prefill width are padded to it only in prefill."""
    decodes = decode_requests(
        engine,
        [BatchRequest(prompt=prompt, max_new_tokens=count) for prompt in prompts],
        method=method,
        block_size=size,
        proposer="repeat",
        eos_token_ids=(),
        pad_token_id=PAD,
    )
    return [[token for record in decode.records for token in record.new] for decode in decodes]


@pytest.mark.parametrize("count", [1, 8, 100])
def test_the_loop_on_the_device_gives_the_tokens_of_the_loop_on_the_host(
    kind: Kind, single: Subject, bundle: Bundle, count: int
):
    """Through one engine, recorded graphs and new ones; with fewer waits of the host."""
    if kind.gpu is None:
        pytest.skip("of TensorRT's engine alone")
    options: dict[str, Any] = {"method": "jacobi", "block_size": 16, "max_new_tokens": 100, "ignore_eos": True}
    with Model(bundle.manifest, single.engine, TextCodec.of_bundle(bundle)) as model:
        expected = model.generate([*range(3, 40)], **options)
        for _ in range(3):
            found = model.generate([*range(3, 40)], **options, forwards_per_sync=count)
            assert (found.token_ids, found.forwards) == (expected.token_ids, expected.forwards)
        assert found.statistics.on_device is not None
        assert found.statistics.on_device.num_syncs <= -(-found.statistics.forwards // count) + 1


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_dead_rows_change_nothing(subject: Subject, size: int):
    """Every row above the write index set to large finite values: the outputs and the rows that count stay as they are,
    bit for bit."""
    engine = subject.engine
    clean, write_index = run(engine, size)
    rows = subject.read_cache()
    poisoned = {past: array.copy() for past, array in rows.items()}
    for array in poisoned.values():
        for slot, start in enumerate(write_index):
            array[slot, :, start:] = 1e4
    subject.write_cache(poisoned)
    again = engine.forward(Batch(random_blocks(engine, size, 1), [1] * engine.num_slots, write_index), with_logits=True)
    assert (again.next_ids, again.num_accepted) == (clean.next_ids, clean.num_accepted)
    for past, array in subject.read_cache().items():
        for slot, start in enumerate(write_index):
            assert np.array_equal(array[slot, :, : start + size], rows[past][slot, :, : start + size]), (past, slot)


def test_later_rows_and_other_slots_change_no_earlier_row(subject: Subject):
    engine, size = subject.engine, 8
    before, write_index = run(engine, size)
    blocks = random_blocks(engine, size, 1)
    for kept in (1, 4):
        others = random_blocks(engine, size, 2)
        changed = [block[:kept] + other[kept:] for block, other in zip(blocks, others, strict=True)]
        changed[1:] = others[1:]
        after = engine.forward(Batch(changed, [1] * engine.num_slots, write_index))
        assert after.next_ids[0][:kept] == before.next_ids[0][:kept]


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_the_cache_is_written_in_place_and_only_where_the_block_is(subject: Subject, size: int):
    engine, slots = subject.engine, subject.engine.num_slots
    addresses, before = subject.addresses(), subject.read_cache()
    assert len(set(addresses.values())) == len(addresses)
    engine.forward(Batch(random_blocks(engine, size, 3), [1] * slots, [30] * slots))
    assert subject.addresses() == addresses
    for past, array in subject.read_cache().items():
        assert np.any(array[:, :, 30 : 30 + size]), f"{past}: the block's rows were not written"
        assert np.array_equal(array[:, :, :30], before[past][:, :, :30]), f"{past}: a row below the block was written"
        # a plan may fill a block up to its profile's size; beyond the largest of them nothing is touched
        assert np.array_equal(array[:, :, 30 + 64 :], before[past][:, :, 30 + 64 :]), f"{past}: rows above were written"


@pytest.mark.slow
def test_ten_thousand_tokens_leave_engine_and_memory_as_they_were(single: Subject):
    engine = single.engine
    prompt = random_blocks(engine, 10, 11)
    first, free = decode(engine, prompt, "jacobi", 16, count=200), single.free_memory()
    for _ in range(ENDURANCE_TOKENS // 200 - 1):
        assert decode(engine, prompt, "jacobi", 16, count=200) == first
    assert single.free_memory() == free


def test_memory_comes_back_after_close(kind: Kind, bundle: Bundle):
    first = kind.open(bundle, 1)
    before = first.free_memory()
    first.close()
    if before is None:
        pytest.skip("of a device that tells what is free")
    free = first.free_memory()
    assert free is not None
    for _ in range(3):
        again = kind.open(bundle, 8)
        run(again.engine, 16)
        again.close()
    left = again.free_memory()
    assert left is not None
    assert abs(left - free) <= MEMORY_SLACK


def test_two_engines_do_not_meet(kind: Kind, bundle: Bundle):
    first, second = kind.open(bundle, 1), kind.open(bundle, 1)
    try:
        alone = run(first.engine, 8)[0].next_ids
        run(second.engine, 8, seed=5)
        assert first.engine.forward(Batch(random_blocks(first.engine, 8, 1), [1], [CHUNK])).next_ids == alone
        assert not set(first.addresses().values()) & set(second.addresses().values())
    finally:
        first.close()
        second.close()
