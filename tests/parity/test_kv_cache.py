"""The KV cache: its rows are the checkpoint's own, written in place, for the slots and rows that the contract says."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from cllm_export.bundle.contract import Batch, cache_names, graph_inputs, graph_outputs
from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import EngineError
from cllm_export.runtime.engines.base import prefill
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from tests.checkpoints import PAD, VARIANTS
from tests.conftest import THREADS, Workshop
from tests.parity.compare import fill_cache, fill_slots, random_prompts, read_cache, stock_cache

KV_TOLERANCE = 2e-5
"""Largest difference of a KV row from PyTorch's, as a share of the largest value of its tensor.

Measured on these models it is 1e-6 to 3e-6: sums of 64 fp32 products, each rounded at 6e-8, in another order, through
two layers. Ten times that leaves room for other CPUs; a wrong position, scale, norm or bias shows from 1e-2 on.
"""
NOT_IN_PLACE = "in-place"
"""What ONNX Runtime's warning about a TensorScatter that copies its cache contains."""


def new_engine(workshop: Workshop, name: str, *, num_slots: int = 1, log_severity: int = 3) -> OrtEngine:
    return OrtEngine(workshop.bundle(name), num_slots=num_slots, threads=THREADS, log_severity=log_severity)


def endless_prompts(model: Model, lengths: list[int]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """A prompt of each length, after which at least eight greedy tokens come before an end of sequence; and those."""
    prompts, greedy = [], []
    for length in lengths:
        for seed in range(20):
            [prompt] = random_prompts(model.engine.geometry.vocab_size, [length], seed=seed)
            tokens = model.generate(prompt, max_new_tokens=8, block_size=8).token_ids
            if len(tokens) == 8:
                break
        assert len(tokens) == 8, "every prompt tried ends early"
        prompts.append(prompt)
        greedy.append(tokens)
    return prompts, greedy


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_after_prefill_are_those_of_transformers_whatever_the_chunk(workshop: Workshop, name: str):
    engine, stock = new_engine(workshop, name), workshop.stock(name)
    [prompt] = random_prompts(engine.geometry.vocab_size, [200])
    expected = stock_cache(stock, prompt[:-1])
    for chunk in (engine.prefill_chunk, 128):
        fill_cache(engine, 0)
        [written] = fill_slots(engine, [prompt], chunk=chunk)
        assert written == 199
        assert_same_rows(engine, expected, f"{name}, chunks of {chunk}")


def test_prefill_of_a_prompt_writes_every_row_but_the_last_tokens(workshop: Workshop):
    engine, stock = new_engine(workshop, "llama"), workshop.stock("llama")
    [prompt] = random_prompts(engine.geometry.vocab_size, [77])
    prefill(engine, prompt[:-1], PAD)
    assert_same_rows(engine, stock_cache(stock, prompt[:-1]), "llama")
    assert not any(np.any(array[:, :, 76:]) for array in read_cache(engine).values())


def assert_same_rows(engine: OrtEngine, expected: dict[str, np.ndarray], what: str) -> None:
    """Require the rows of slot 0 to be the expected ones within KV_TOLERANCE."""
    assert expected.keys() == engine.cache_addresses.keys()
    for past, rows in expected.items():
        off = np.abs(engine.read_cache(past)[:1, :, : rows.shape[2]] - rows).max(axis=(0, 1, 3)) / np.abs(rows).max()
        first = int(np.argmax(off > KV_TOLERANCE))
        assert off.max() < KV_TOLERANCE, (
            f"{what}, {past}: row {first} is the first that is off, the worst {off.max():.1e}"
        )


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_kv_length_that_attention_reads_changes_no_bit(workshop: Workshop, name: str, block_size: int):
    """Equality is required, for losslessness rests on it: of the operator, and of attention spelled out (gemma2).

    The same position is computed at one write index by one loop and at another by the other, so now with a longer
    KV length, now with a shorter. An idle slot further on makes the KV length of all slots longer.
    """
    engine = new_engine(workshop, name, num_slots=2)
    prompt, block = random_prompts(engine.geometry.vocab_size, [42, block_size])
    before: list[bytes] = []
    for further in range(41, engine.geometry.cache_length - block_size, 13):
        fill_cache(engine, 0)
        fill_slots(engine, [prompt, [0]], chunk=16)
        next_ids, _, _ = engine.forward(Batch([block, block], [1, 0], [41, further]))
        rows = [array[0, :, 41 : 41 + block_size].tobytes() for array in read_cache(engine).values()]
        found = [str(next_ids[0]).encode(), *rows]
        assert found == (before or found), f"a KV length of about {further + block_size} rows changed the forward"
        before = found


@pytest.mark.parametrize("name", ["llama", "qwen3-untied-bias"])
def test_prefill_writes_the_bits_that_a_forward_over_the_same_chunk_writes(workshop: Workshop, name: str):
    """They differ in the rows the head is computed for, and the cache is written before it: equality is required."""
    caches = []
    for call in ("prefill", "forward"):
        engine = new_engine(workshop, name)
        [prompt] = random_prompts(engine.geometry.vocab_size, [100])
        for start, end in ((0, 50), (50, 100)):
            getattr(engine, call)(Batch([prompt[start:end]], [end - start], [start]))
        caches.append({past: array.tobytes() for past, array in read_cache(engine).items()})
    assert caches[0] == caches[1]


def test_a_slot_that_waits_keeps_the_rows_below_its_write_index(workshop: Workshop):
    """While another slot reads its prompt, rows are written for this one too, above those that count."""
    engine = new_engine(workshop, "llama", num_slots=2)
    first, second = random_prompts(engine.geometry.vocab_size, [30, 20])
    valid = fill_slots(engine, [first, [0]], chunk=8)
    before = {past: array[0, :, : valid[0]] for past, array in read_cache(engine).items()}
    for start in (0, 10):
        engine.prefill(Batch([second[start : start + 10]] * 2, [0, 10], [valid[0], start]))
    for past, rows in before.items():
        assert np.array_equal(engine.read_cache(past)[0, :, : valid[0]], rows), f"{past} of slot 0 was overwritten"


def test_committed_tokens_at_the_head_count_as_right_and_an_idle_slot_accepts_nothing(workshop: Workshop):
    """The counts of the contract, with drafts of which it is known how many tokens are right."""
    model = workshop.model("llama-llama3-bf16-sharded")
    engine = OrtEngine(workshop.bundle("llama-llama3-bf16-sharded"), num_slots=2, threads=THREADS)
    prompts, greedy = endless_prompts(model, [20, 33])
    wrong = [[(token + 1) % engine.geometry.vocab_size for token in tokens] for tokens in greedy]
    write_index = fill_slots(engine, [prompts[0][:-2], prompts[1]], chunk=8)
    assert write_index == [17, 32]

    three_committed = [*prompts[0][-3:], *greedy[0][:3], wrong[0][3], greedy[0][4]]
    one_committed = [prompts[1][-1], *greedy[1][:1], wrong[1][1], *greedy[1][2:7]]
    forward = engine.forward(Batch([three_committed, one_committed], [3, 1], write_index))
    assert forward.num_accepted == [3 + 3, 1 + 1]
    assert forward.next_ids[0][2:6] == list(greedy[0][:4])
    assert forward.next_ids[1][0:2] == list(greedy[1][:2])

    all_right = [prompts[1][-1], *greedy[1][:7]]
    forward = engine.forward(Batch([three_committed, all_right], [0, 1], write_index))
    assert forward.num_accepted == [0, 8], "an idle slot accepts nothing, a draft that is all right is accepted whole"
    assert forward.next_ids[1] == list(greedy[1])

    forward = engine.forward(Batch([wrong[0], all_right], [8, 0], write_index))
    assert forward.num_accepted == [8, 0], "a chunk of the prompt is right whatever the model predicts"


def test_an_idle_slot_accepts_nothing_even_where_its_draft_is_right(workshop: Workshop):
    model = workshop.model("mistral")
    engine = OrtEngine(workshop.bundle("mistral"), num_slots=2, threads=THREADS)
    [prompt], [greedy] = endless_prompts(model, [12])
    write_index = fill_slots(engine, [prompt, prompt], chunk=4)
    block = [prompt[-1], *greedy[:3]]
    forward = engine.forward(Batch([block, block], [0, 1], write_index))
    assert forward.num_accepted == [0, 4]
    assert forward.next_ids[1] == list(greedy[:4])


@pytest.mark.parametrize(
    ("blocks", "committed", "write_index"),
    [
        ([[1, 2, 3]], [1, 1], [0, 0]),
        ([[1, 2, 3], [1, 2]], [1, 1], [0, 0]),
        ([[1, 2, 3], [1, 2, 3]], [1], [0, 0]),
        ([[1, 2, 3], [1, 2, 3]], [1, 1], [0]),
        ([[1, 2, 3], [1, 2, 3]], [1, 1], [0, -1]),
        ([[1, 2, 3], [1, 2, 3]], [1, 1], [0, 10_000]),
        ([[1, 2, 3], [1, 2, 100_000]], [1, 1], [0, 0]),
    ],
    ids=["one block", "ragged", "one num_committed", "one write_index", "below 0", "beyond the cache", "no such token"],
)
def test_a_forward_of_the_wrong_shape_or_place_is_refused(
    workshop: Workshop, blocks: list[list[int]], committed: list[int], write_index: list[int]
):
    engine = new_engine(workshop, "llama", num_slots=2)
    with pytest.raises(EngineError):
        engine.forward(Batch(blocks, committed, write_index))


def test_rows_move_from_one_slot_to_another_and_decode_goes_on_as_if_they_were_computed_there(workshop: Workshop):
    engine = new_engine(workshop, "llama", num_slots=2)
    [prompt] = random_prompts(engine.geometry.vocab_size, [50])
    fill_slots(engine, [prompt, prompt[:20]], chunk=16)
    block = [prompt[-1], *prompt[:7]]
    expected = engine.forward(Batch([block] * 2, [1, 0], [49, 0]))
    rows = engine.read_rows(0, 0, 49)
    engine.write_rows(1, 0, 20, rows[:, :, :20])
    engine.write_rows(1, 20, 49, rows[:, :, 20:])
    found = engine.forward(Batch([block] * 2, [0, 1], [0, 49]))
    assert found.next_ids[1] == expected.next_ids[0]
    assert found.num_accepted == [0, expected.num_accepted[0]]
    assert np.array_equal(engine.read_rows(1, 0, 57), np.concatenate((rows, engine.read_rows(1, 49, 57)), axis=2))


def test_rows_that_were_read_are_a_copy_in_graph_order(workshop: Workshop):
    engine = new_engine(workshop, "llama", num_slots=2)
    [prompt] = random_prompts(engine.geometry.vocab_size, [30])
    fill_slots(engine, [prompt, prompt], chunk=16)
    rows = engine.read_rows(1, 3, 9)
    before = rows.copy()
    for array, expected in zip(read_cache(engine).values(), before, strict=True):
        assert np.array_equal(array[1, :, 3:9], expected)
    fill_cache(engine, 1)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize(("slot", "start", "stop"), [(-1, 0, 4), (2, 0, 4), (0, -1, 4), (0, 4, 3), (0, 0, 10_000)])
def test_rows_that_do_not_exist_are_refused(workshop: Workshop, slot: int, start: int, stop: int):
    engine = new_engine(workshop, "llama", num_slots=2)
    rows = engine.read_rows(0, 0, 4)
    with pytest.raises(EngineError, match=r"no slot|are no rows of a cache"):
        engine.read_rows(slot, start, stop)
    with pytest.raises(EngineError, match=r"no slot|are no rows of a cache"):
        engine.write_rows(slot, start, stop, rows)


def test_rows_of_another_shape_or_dtype_are_refused(workshop: Workshop):
    engine = new_engine(workshop, "llama")
    rows = engine.read_rows(0, 0, 4)
    for wrong in (rows[:, :, :3], rows[1:], rows.astype(np.float16)):
        with pytest.raises(EngineError, match="this engine takes rows"):
            engine.write_rows(0, 0, 4, wrong)


def test_past_and_present_on_one_buffer_make_no_copy(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    engine = new_engine(workshop, "llama", num_slots=2, log_severity=2)
    addresses = engine.cache_addresses
    for write_index in (0, 8, 100):
        engine.forward(Batch([[1] * 8] * 2, [1, 1], [write_index, 0]))
    assert capfd.readouterr().err == ""
    assert engine.cache_addresses == addresses
    for past, array in read_cache(engine).items():
        assert np.any(array[0, :, 100:108]), f"{past}: the rows of the last forward are not in the engine's own buffer"
        assert not np.any(array[:, :, 108:]), f"{past}: rows beyond the block were written"


def test_onnx_runtime_warns_where_past_and_present_lie_apart(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    """The control of the test above: without its warning, silence would prove nothing."""
    _run_with_separate_present(workshop.bundle("llama"))
    assert NOT_IN_PLACE in capfd.readouterr().err


def _run_with_separate_present(bundle: Bundle) -> None:
    """One forward of one slot, bound by hand, whose present caches have memory of their own."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(bundle.graph_path()), options, providers=["CPUExecutionProvider"])
    manifest = bundle.manifest
    lengths = {"B": 1, "n": 4, "S": 64, "h": 4, "R": 4}
    fed = {"num_committed": [1], "kv_positions": range(64), "head_rows": range(4)}
    binding = session.io_binding()
    arrays = []
    for specs, bind in (
        (graph_inputs(manifest.geometry, manifest.precision), binding.bind_ortvalue_input),
        (graph_outputs(manifest.geometry, manifest.precision), binding.bind_ortvalue_output),
    ):
        for spec in specs:
            array = np.zeros([lengths.get(str(dim), dim) for dim in spec.shape], spec.dtype)
            array[...] = np.reshape(list(fed.get(spec.name, [0])), (-1,)) if array.ndim == 1 else 0
            arrays.append(array)
            bind(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    session.run_with_iobinding(binding)
    assert len(arrays) == 5 + 3 + 2 * len(list(cache_names(manifest.geometry.num_layers)))
