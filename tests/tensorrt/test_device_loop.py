"""The loop on the device: its kernel is the policy of ``SlidingJacobi``, its tokens are those of the loop on the host.

Nothing here ran on a GPU. The kernel's very source is compiled for the CPU and driven by the simulated GPU; where
NVRTC is installed, it is compiled for real devices as well, and not run.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import EngineError, OptionError, WhileGraphError
from cllm_export.runtime.decoding.drafts.sources import make_proposer
from cllm_export.runtime.decoding.jacobi import SlidingJacobi
from cllm_export.runtime.decoding.request import Decode
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.loop import commit_kernel, condition_kernel
from cllm_export.tensorrt.loop.commit_kernel import REPEAT, SOURCE
from cllm_export.tensorrt.loop.device_kernel import compile_kernel
from cllm_export.tensorrt.loop.device_loop import DeviceLoop, Form
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.acceptance.test_acceptance import decode as decode_on_host
from tests.conftest import Workshop
from tests.fakes import properties
from tests.tensorrt.doubles import CudaDouble, describe
from tests.tensorrt.install import BUILD, CUDA, NVRTC
from tests.tensorrt.simulation import SimulatedGpu, SimulatedNvrtc, compile_for_cpu

BLOCK_SIZE = 8


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel as a function of the CPU, called once for each thread."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    assert compile_for_cpu(SOURCE, path)
    return ctypes.CDLL(str(path)).commit_blocks


@properties
@given(data=st.data())
def test_the_kernel_is_the_policy_of_the_loop_on_the_host(kernel: Any, data: st.DataObject):
    """Any predictions and counts, several slots at once: block, write index and end are the policy's own, and the ring
    holds what the policy was given."""
    slots, n, limit = (data.draw(st.integers(1, most)) for most in (3, 6, 20))
    proposer = data.draw(st.sampled_from(["pad", "repeat"]))
    eos, ring_size = [1, 2], 3
    decodes = [
        Decode(
            SlidingJacobi(
                last_token=9, write_index=slot, proposer=make_proposer(proposer, prompt=[9], pad_token_id=0, seed=0)
            ),
            max_new_tokens=limit,
            eos_token_ids=frozenset(eos),
        )
        for slot in range(slots)
    ]
    blocks = np.array([decode.next_block(n).tokens for decode in decodes], np.int64)
    committed, write_index = np.ones(slots, np.int64), np.arange(slots, dtype=np.int64)
    left, turns = np.full(slots, limit, np.int32), np.zeros(slots, np.int32)
    ring, ends = np.zeros((slots, ring_size, 1 + n), np.int32), np.array(eos, np.int32)
    for _ in range(4):
        next_ids = np.array(
            data.draw(st.lists(st.lists(st.integers(0, 12), min_size=n, max_size=n), min_size=slots, max_size=slots)),
            np.int64,
        )
        accepted = np.array([data.draw(st.integers(1, n)) if one else 0 for one in committed], np.int64)
        arrays = (next_ids, accepted, blocks, committed, write_index, left, turns, ring, ends)
        for thread in range(slots + 2):
            kernel(
                thread,
                *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
                *map(ctypes.c_int, (len(eos), n, ring_size, 0 if proposer == "pad" else REPEAT, slots)),
            )
        for slot, decode in enumerate(decodes):
            if not decode.is_finished:
                decode.take(next_ids[slot].tolist(), int(accepted[slot]))
                entry = ring[slot, (turns[slot] - 1) % ring_size].tolist()
                assert entry == [int(accepted[slot]), *next_ids[slot].tolist()]
            assert turns[slot] == len(decode.records), "a slot that has ended tells nothing more"
            assert bool(left[slot]) == (not decode.is_finished)
            assert bool(committed[slot]) == (not decode.is_finished)
            if not decode.is_finished:
                assert blocks[slot].tolist() == decode.next_block(n).tokens
                assert write_index[slot] == decode.write_index


def make_loop(engine: TrtEngine, simulated: SimulatedGpu, directory: Path, **options: Any) -> DeviceLoop:
    compiler = simulated.compiler(directory)
    return DeviceLoop(engine, block_size=BLOCK_SIZE, compute_capability="9.0", compiler=compiler, **options)


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


@pytest.mark.parametrize(("slots", "k"), [(1, 1), (1, 4), (3, 8)])
@pytest.mark.parametrize("cuda", CUDA)
@pytest.mark.parametrize("form", get_args(Form))
def test_tokens_are_those_of_the_loop_on_the_host_with_fewer_waits(
    bundle: Bundle, tmp_path: Path, cuda: str, slots: int, k: int, form: Form
):
    simulated = SimulatedGpu(cuda=cuda)
    options = PlanOptions(batch_size=slots, block_sizes=(BLOCK_SIZE, 16), prefill_chunk=16)
    plan = build_plan(bundle, options, gpu=simulated.gpu)
    generator = random.Random(3)
    vocabulary = bundle.manifest.geometry.vocab_size
    prompts = [[generator.randrange(vocabulary) for _ in range(1 + 20 * slot)] for slot in range(slots)]
    with TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as engine:
        expected = decode_on_host(engine, prompts, "jacobi", BLOCK_SIZE, count=50)
        with DeviceLoop(
            engine,
            block_size=BLOCK_SIZE,
            compute_capability="9.0",
            forwards_per_sync=k,
            form=form,
            compiler=simulated.compiler(tmp_path, cuda),
        ) as loop:
            for _ in range(2):  # enqueued and captured, then replayed
                result = loop.run(prompts, max_new_tokens=50, eos_token_ids=(), proposed_token=None)
                assert result.token_ids == expected
                assert (result.form, result.form_reason) == (form, None)
                assert result.num_forwards >= result.num_syncs
                assert result.num_syncs <= -(-50 // k) + len(plan.manifest.settings.kv_lengths), (
                    "and one to record each"
                )
            ended = loop.run(prompts, max_new_tokens=50, eos_token_ids={expected[0][4]}, proposed_token=0)
            assert ended.token_ids[0] == expected[0][: expected[0].index(expected[0][4]) + 1]
        assert decode_on_host(engine, prompts, "jacobi", BLOCK_SIZE, count=50) == expected, (
            "the loop left the engine changed"
        )
    assert simulated.cuda.is_empty()
    assert not simulated.driver.behaviour.modules


@pytest.mark.parametrize("form", get_args(Form))
def test_a_run_up_to_the_end_of_the_cache_stays_inside_it(bundle: Bundle, tmp_path: Path, form: Form):
    """The last graphs hold fewer forwards; the simulation fails on a row outside the cache."""
    simulated = SimulatedGpu()
    plan = build_plan(bundle, PlanOptions(block_sizes=(BLOCK_SIZE,)), gpu=simulated.gpu)
    with TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as engine:
        room = engine.geometry.cache_length - BLOCK_SIZE + 1
        expected = decode_on_host(engine, [[5, 6]], "jacobi", BLOCK_SIZE, count=room - 2)
        with make_loop(engine, simulated, tmp_path, form=form) as loop:
            for _ in range(2):
                result = loop.run([[5, 6]], max_new_tokens=room - 2, eos_token_ids=(), proposed_token=None)
                assert result.token_ids == expected
            with pytest.raises(EngineError, match=f"come to {room + 1}, this engine holds {room}"):
                loop.run([[5, 6]], max_new_tokens=room - 1, eos_token_ids=(), proposed_token=0)
            with pytest.raises(EngineError, match="each of 1 slots"):
                loop.run([[5], [6]], max_new_tokens=1, eos_token_ids=(), proposed_token=0)
        with pytest.raises(EngineError, match="has blocks of 8, got 4"):
            DeviceLoop(engine, block_size=4, compute_capability="9.0", compiler=simulated.compiler(tmp_path))


def open_engine(bundle: Bundle, simulated: SimulatedGpu) -> TrtEngine:
    return TrtEngine(
        bundle, plan=build_plan(bundle, PlanOptions(block_sizes=(BLOCK_SIZE,)), gpu=simulated.gpu), gpu=simulated.gpu
    )


def test_a_while_node_ends_with_the_request_where_the_unrolled_form_idles(bundle: Bundle, tmp_path: Path):
    simulated = SimulatedGpu()
    results = {}
    with open_engine(bundle, simulated) as engine:
        for form in get_args(Form):
            with make_loop(engine, simulated, tmp_path, form=form, forwards_per_sync=30) as loop:
                for _ in range(2):
                    before = simulated.tensorrt.executions
                    result = loop.run([[5, 6, 7]], max_new_tokens=20, eos_token_ids=(), proposed_token=0)
                    assert simulated.tensorrt.executions - before == result.num_forwards + 1, "and one of the prompt"
                results[form] = result
    assert results["unrolled"].token_ids == results["conditional"].token_ids
    assert results["unrolled"].num_forwards == 30
    assert results["conditional"].num_forwards <= 20
    assert [result.num_syncs for result in results.values()] == [1, 1]
    assert simulated.cuda.body_runs == 2 * results["conditional"].num_forwards - 1, "all but the one that recorded"


def break_driver(simulated: SimulatedGpu) -> None:
    simulated.cuda.driver = 12030


def break_runtime(simulated: SimulatedGpu) -> None:
    simulated.cuda.runtime_version = 12030


def break_forward(simulated: SimulatedGpu) -> None:
    simulated.tensorrt.broken.add("host")


def break_instantiation(simulated: SimulatedGpu) -> None:
    simulated.cuda.broken.add("while")


def break_compiler(compiler: Any) -> None:
    compiler[0].behaviour.broken.add(condition_kernel.NAME)


REASONS = {
    "needs CUDA 12.4 or newer, the driver has 12.3": break_driver,
    "needs CUDA 12.4 or newer, cuda-python's runtime has 12.3": break_runtime,
    "may not hold nodes of kind Host": break_forward,
    "CUDA does not take this body in a WHILE node: cudaGraphInstantiate failed: cudaErrorNotSupported": (
        break_instantiation
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_auto_unrolls_and_says_why_and_conditional_refuses(bundle: Bundle, tmp_path: Path, reason: str):
    simulated = SimulatedGpu()
    with open_engine(bundle, simulated) as engine:
        expected = decode_on_host(engine, [[5, 6, 7]], "jacobi", BLOCK_SIZE, count=20)
        REASONS[reason](simulated)
        with make_loop(engine, simulated, tmp_path, forwards_per_sync=2) as loop:
            for _ in range(2):
                result = loop.run([[5, 6, 7]], max_new_tokens=20, eos_token_ids=(), proposed_token=None)
                assert result.token_ids == expected
                assert result.form == loop.form == "unrolled"
                assert reason in str(result.form_reason)
        with (
            pytest.raises(WhileGraphError, match=reason),
            make_loop(engine, simulated, tmp_path, form="conditional") as loop,
        ):
            loop.run([[5, 6, 7]], max_new_tokens=20, eos_token_ids=(), proposed_token=None)
    assert simulated.cuda.is_empty()
    assert not simulated.driver.behaviour.modules


def test_a_compiler_without_while_nodes_unrolls_and_says_so(bundle: Bundle, tmp_path: Path):
    simulated = SimulatedGpu()
    compiler = simulated.compiler(tmp_path)
    break_compiler(compiler)
    with open_engine(bundle, simulated) as engine:
        asked = {"block_size": BLOCK_SIZE, "compute_capability": "9.0", "compiler": compiler}
        with DeviceLoop(engine, **asked) as loop:
            assert loop.form == "unrolled"
            assert "NVRTC does not compile" in str(loop.form_reason)
        with pytest.raises(EngineError, match="NVRTC does not compile"):
            DeviceLoop(engine, form="conditional", **asked)
        with pytest.raises(OptionError, match="form is one of auto, conditional, unrolled, got 'while'"):
            DeviceLoop(engine, form="while", **asked)
    assert not simulated.driver.behaviour.modules


def test_auto_takes_the_conditional_form_where_it_can(bundle: Bundle, tmp_path: Path):
    simulated = SimulatedGpu()
    with open_engine(bundle, simulated) as engine, make_loop(engine, simulated, tmp_path) as loop:
        result = loop.run([[5, 6, 7]], max_new_tokens=20, eos_token_ids=(), proposed_token=None)
    assert (result.form, result.form_reason) == ("conditional", None)


def test_a_kernel_that_does_not_compile_is_told_in_the_compilers_words(tmp_path: Path):
    behaviour = SimulatedNvrtc(tmp_path / "missing")
    with pytest.raises(EngineError, match="NVRTC does not compile the loop's kernel: no such"):
        compile_kernel(CudaDouble(describe("cuda", CUDA[-1])["nvrtc"], behaviour), SOURCE, "9.0")
    assert behaviour.options == [b"--gpu-architecture=sm_90"]


@pytest.mark.parametrize("kernel_module", [commit_kernel, condition_kernel], ids=["commit", "condition"])
@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "12.0"])
def test_a_kernel_compiles_for_real_devices(capability: str, kernel_module: ModuleType):
    library = next((BUILD / "nvrtc" / NVRTC).rglob("libnvrtc.so.*"), None)
    bindings = BUILD / "cuda" / CUDA[-1]
    if library is None or not bindings.is_dir():
        pytest.skip("NVRTC is not installed: run `make bindings`")
    code = (
        "from cuda.bindings import nvrtc\n"
        f"from {kernel_module.__name__} import SOURCE\n"
        "from cllm_export.tensorrt.loop.device_kernel import compile_kernel\n"
        f"print(compile_kernel(nvrtc, SOURCE, {capability!r})[:4])"
    )
    paths = {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": f"{BUILD.parent}:{bindings}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == r"b'\x7fELF'", done.stderr
