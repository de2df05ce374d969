"""The TensorRT engine over a simulated GPU: its tokens are ONNX Runtime's own, and all it takes is given back.

Nothing here ran on a GPU. The simulation computes with ONNX Runtime over the addresses and shapes that the engine gave
to TensorRT, so that a wrong address, shape, order or size gives other tokens or fails; see ``simulation``.
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
from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import prefill
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import PINNED, THREADS, Workshop
from tests.tensorrt import simulation
from tests.tensorrt.caches import cache_addresses, read_cache, write_cache
from tests.tensorrt.simulation import SimulatedGpu, versions

BLOCK_SIZE = 8


@pytest.fixture(params=list(versions()), ids=[version for version, _ in versions()])
def simulated(request: pytest.FixtureRequest) -> SimulatedGpu:
    tensorrt, cuda = request.param
    return SimulatedGpu(tensorrt=tensorrt, cuda=cuda)


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


def open_engine(bundle: Bundle, simulated: SimulatedGpu, *, cuda_graphs: bool = True, **options: Any) -> TrtEngine:
    settled = {"block_sizes": (1, BLOCK_SIZE), "prefill_chunk": 16, "kv_lengths": (32, 64), **options}
    plan = build_plan(bundle, PlanOptions(**settled), gpu=simulated.gpu)
    return TrtEngine(bundle, plan=plan, gpu=simulated.gpu, cuda_graphs=cuda_graphs)


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[TrtEngine]:
    with open_engine(bundle, SimulatedGpu(), batch_size=2) as engine:
        yield engine


def tokens_of(engine: Any, bundle: Bundle, prompt: list[int], **options: Any) -> tuple[int, ...]:
    model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
    return model.generate(prompt, max_new_tokens=60, ignore_eos=True, **options).token_ids


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "no graphs"])
def test_every_loop_gives_the_cpu_engines_tokens(simulated: SimulatedGpu, bundle: Bundle, cuda_graphs: bool):
    """Equality is required: the simulation computes with the very operators of the CPU engine."""
    prompt = random.Random(0).choices(range(bundle.manifest.geometry.vocab_size), k=37)
    cpu = OrtEngine(bundle, num_slots=1, threads=THREADS)
    with open_engine(bundle, simulated, cuda_graphs=cuda_graphs) as engine:
        for method in METHODS:
            options: dict[str, Any] = {"method": method, "block_size": BLOCK_SIZE}
            assert tokens_of(engine, bundle, prompt, **options) == tokens_of(cpu, bundle, prompt, **options)
        assert bool(simulated.cuda.launches) == cuda_graphs
    assert simulated.cuda.is_empty()


def test_a_pinned_plan_runs_without_profiles(simulated: SimulatedGpu, workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("small", **PINNED), tmp_path / "bundle")
    prompt = random.Random(1).choices(range(bundle.manifest.geometry.vocab_size), k=21)
    plan = build_plan(bundle, gpu=simulated.gpu)
    with TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as engine:
        expected = tokens_of(OrtEngine(bundle, threads=THREADS), bundle, prompt)
        assert tokens_of(engine, bundle, prompt) == expected
        assert not simulated.trt.called("IExecutionContext.set_input_shape")


@pytest.mark.parametrize("flag", ["strip_weights", "weight_streaming", "version_compatible"])
def test_a_plan_with_a_flag_runs_as_one_without(simulated: SimulatedGpu, bundle: Bundle, flag: str):
    prompt = [5, 6, 7]
    with open_engine(bundle, simulated, **{flag: True}) as engine:
        expected = tokens_of(OrtEngine(bundle, threads=THREADS), bundle, prompt, block_size=BLOCK_SIZE)
        assert tokens_of(engine, bundle, prompt, block_size=BLOCK_SIZE) == expected


def test_there_is_one_captured_graph_for_each_profile_and_kv_length(bundle: Bundle):
    simulated = SimulatedGpu()
    with open_engine(bundle, simulated) as engine:
        before = len(simulated.runtime.calls)
        for size, start in ((1, 0), (1, 1), (8, 2), (8, 30), (1, 40), (8, 60), (1, 2), (8, 3)):
            engine.forward(Batch([[1] * size], [1], [start]))
        called = [name for name, _ in simulated.runtime.calls[before:]]
        # n = 1 with KV lengths 32 and 64; n = 8 with 32, 64 and the whole cache
        assert called.count("cudaStreamBeginCapture") == 5
        assert called.count("cudaGraphLaunch") == 8 - 5
        assert engine.num_syncs == 8


def test_a_forward_moves_the_block_and_the_predictions_over_the_bus_and_nothing_else(bundle: Bundle):
    simulated = SimulatedGpu()
    with open_engine(bundle, simulated) as engine:
        for _ in range(2):
            before = simulated.cuda.bytes_copied
            engine.forward(Batch([[1] * BLOCK_SIZE], [1], [0]))
            assert simulated.cuda.bytes_copied - before == 8 * (BLOCK_SIZE + 1 + 1) + 8 * (BLOCK_SIZE + 1)


def test_logits_come_to_the_host_only_if_asked_for_and_are_those_of_the_cpu_engine(engine: TrtEngine, bundle: Bundle):
    cpu = OrtEngine(bundle, num_slots=2, threads=THREADS)
    block = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]
    for _ in range(2):  # enqueued, then replayed
        assert engine.forward(Batch(block, [1, 0], [0, 0])).logits is None
        logits = engine.forward(Batch(block, [1, 0], [0, 0]), with_logits=True).logits
        expected = cpu.forward(Batch(block, [1, 0], [0, 0]), with_logits=True).logits
        assert logits is not None
        assert expected is not None
        np.testing.assert_array_equal(logits, expected)


def test_the_cache_stays_where_it_is_and_holds_the_rows_that_were_written(engine: TrtEngine, bundle: Bundle):
    addresses = cache_addresses(engine)
    cpu = OrtEngine(bundle, num_slots=2, threads=THREADS)
    for each in (engine, cpu):
        each.prefill(Batch([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], [5, 5], [0, 0]))
        each.forward(Batch([[8] * BLOCK_SIZE] * 2, [1, 1], [5, 3]))
    assert cache_addresses(engine) == addresses
    assert len(set(addresses.values())) == len(addresses)
    found = read_cache(engine)
    for past in cpu.cache_addresses:
        np.testing.assert_array_equal(found[past], cpu.read_cache(past))


def test_rows_of_a_slot_are_those_of_the_cpu_engine_and_can_be_moved_to_another(engine: TrtEngine, bundle: Bundle):
    cpu = OrtEngine(bundle, num_slots=2, threads=THREADS)
    for each in (engine, cpu):
        each.prefill(Batch([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], [5, 5], [0, 0]))
    rows = engine.read_rows(1, 1, 4)
    np.testing.assert_array_equal(rows, cpu.read_rows(1, 1, 4))
    assert rows.any()
    engine.write_rows(0, 1, 4, rows)
    np.testing.assert_array_equal(engine.read_rows(0, 1, 4), rows)
    np.testing.assert_array_equal(engine.read_rows(0, 4, 5), cpu.read_rows(0, 4, 5))
    assert engine.read_rows(0, 2, 2).shape[2] == 0
    with pytest.raises(EngineError, match="no slot 2"):
        engine.read_rows(2, 0, 1)
    with pytest.raises(EngineError, match="this engine takes rows"):
        engine.write_rows(0, 0, 2, rows)


def test_a_cache_starts_as_zeros_and_can_be_replaced(engine: TrtEngine):
    cache = read_cache(engine)
    for array in cache.values():
        assert not array.any()
        array[...] = 7
    write_cache(engine, cache)
    assert all((array == 7).all() for array in read_cache(engine).values())


@pytest.mark.parametrize(
    ("blocks", "committed", "write_index", "message"),
    [
        ([[1] * 8] * 2, [1, 1], [0, 10_000], "cache rows"),
        ([[1] * 8] * 2, [1, 1], [0, -1], "write index must be at least 0"),
        ([[1] * 8], [1, 1], [0, 0], "each of 2 slots"),
        ([[1] * 8, [1] * 7], [1, 1], [0, 0], "must all have 8 tokens"),
        ([[1] * 8, [1] * 7 + [10_000]], [1, 1], [0, 0], "tokens must be 0 to"),
        ([[1] * 8, [1] * 7 + [-1]], [1, 1], [0, 0], "tokens must be 0 to"),
        ([[1] * 9] * 2, [1, 1], [0, 0], "profiles for blocks of 1, 8, got 9.*--block-size 9"),
    ],
)
def test_a_forward_that_cannot_be_right_is_refused_before_anything_is_enqueued(
    engine: TrtEngine, blocks: Any, committed: Any, write_index: Any, message: str
):
    before = list(engine._cuda.runtime.calls)
    with pytest.raises(EngineError, match=message):
        engine.forward(Batch(blocks, committed, write_index))
    assert engine._cuda.runtime.calls == before


def test_a_chunk_that_is_too_wide_is_refused(engine: TrtEngine):
    with pytest.raises(EngineError, match="takes chunks of 16 tokens, got 17"):
        engine.prefill(Batch([[1] * 17] * 2, [17, 17], [0, 0]))


def test_a_plan_without_logits_refuses_a_request_that_needs_them(bundle: Bundle):
    with (
        open_engine(bundle, SimulatedGpu(), logits=False) as engine,
        pytest.raises(EngineError, match="built with logits=False"),
    ):
        engine.forward(Batch([[1]], [1], [0]), with_logits=True)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_block_between_two_profiles_runs_in_the_larger_one(engine: TrtEngine, bundle: Bundle, size: int):
    """The tokens that fill it up change nothing and are never accepted, though the model may predict just them."""
    cpu = OrtEngine(bundle, num_slots=2, threads=THREADS)
    blocks = [[3, 1, 4, 1, 5, 9, 2, 6][:size], [0] * size]
    for committed in ([1, 1], [size, 0]):
        given, expected = (each.forward(Batch(blocks, committed, [0, 3]), with_logits=True) for each in (engine, cpu))
        assert given[:2] == expected[:2]
        assert given.logits is not None
        assert given.logits.shape == (2, size, bundle.manifest.geometry.vocab_size)
        np.testing.assert_allclose(given.logits, expected.logits, rtol=0, atol=1e-4)  # shapes differ by rounding


@pytest.mark.parametrize("broken", ["deserialize", "alias", "refit", "execute"])
def test_an_engine_that_fails_says_why_in_tensorrts_words_and_gives_everything_back(bundle: Bundle, broken: str):
    simulated = SimulatedGpu()
    plan = build_plan(bundle, PlanOptions(strip_weights=True), gpu=simulated.gpu)
    simulated.tensorrt.broken.add(broken)
    words = "in place of" if broken == "alias" else rf"TensorRT says: \[simulated\] {broken} failed"
    with pytest.raises(EngineError, match=words), TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as engine:
        engine.forward(Batch([[1]], [1], [0]))
    assert simulated.cuda.is_empty()


def test_a_device_that_is_too_small_is_said_in_cudas_words_and_nothing_is_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    simulated = SimulatedGpu()
    plan = build_plan(bundle, gpu=simulated.gpu)
    monkeypatch.setattr(simulation, "MEMORY", 100_000)
    with pytest.raises(EngineError, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        TrtEngine(bundle, plan=plan, gpu=simulated.gpu)
    assert simulated.cuda.is_empty()


def test_a_closed_engine_says_so_and_may_be_closed_again(bundle: Bundle):
    simulated = SimulatedGpu()
    engine = open_engine(bundle, simulated)
    engine.forward(Batch([[1]], [1], [0]))
    engine.close()
    assert simulated.cuda.is_empty()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.forward(Batch([[1]], [1], [0]))


def test_two_engines_on_one_gpu_do_not_meet(bundle: Bundle):
    simulated = SimulatedGpu()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]
    with open_engine(bundle, simulated) as first:
        plan = build_plan(bundle, PlanOptions(block_sizes=(1, BLOCK_SIZE)), gpu=simulated.gpu)
        with TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as second:
            alone = first.forward(Batch([prompts[0]], [1], [0]))
            prefill(second, prompts[1], 0)
            assert first.forward(Batch([prompts[0]], [1], [0])) == alone
            assert not set(cache_addresses(first).values()) & set(cache_addresses(second).values())
        assert first.forward(Batch([prompts[0]], [1], [0])) == alone, "closing one engine harmed the other"
