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
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle import Bundle
from cllm_export.errors import EngineError
from cllm_export.exporter.plan import PlanOptions, build_plan
from cllm_export.runtime.commit_kernel import REPEAT, SOURCE, compile_kernel
from cllm_export.runtime.device_loop import DeviceLoop
from cllm_export.runtime.draft import make_fill
from cllm_export.runtime.jacobi import SlidingJacobi
from cllm_export.runtime.request import Decode
from cllm_export.runtime.trt_engine import TrtEngine
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
    """Any predictions and counts, several slots at once: block, write index, tokens and end are the policy's own."""
    slots, n, limit = (data.draw(st.integers(1, most)) for most in (3, 6, 20))
    fill = data.draw(st.sampled_from(["pad", "repeat"]))
    eos, ring_size = [1, 2], 64
    decodes = [
        Decode(
            SlidingJacobi(last_token=9, write_index=slot, fill=make_fill(fill, prompt=[9], pad_token_id=0, seed=0)),
            max_new_tokens=limit,
            eos_token_ids=frozenset(eos),
        )
        for slot in range(slots)
    ]
    blocks = np.array([decode.next_block(n).tokens for decode in decodes], np.int64)
    committed, write_index = np.ones(slots, np.int64), np.arange(slots, dtype=np.int64)
    left, emitted = np.full(slots, limit, np.int32), np.zeros(slots, np.int32)
    ring, ends = np.zeros((slots, ring_size), np.int32), np.array(eos, np.int32)
    for _ in range(4):
        next_ids = np.array(
            data.draw(st.lists(st.lists(st.integers(0, 12), min_size=n, max_size=n), min_size=slots, max_size=slots)),
            np.int64,
        )
        accepted = np.array([data.draw(st.integers(1, n)) if one else 0 for one in committed], np.int64)
        arrays = (next_ids, accepted, blocks, committed, write_index, left, emitted, ring, ends)
        for thread in range(slots + 2):
            kernel(
                thread,
                *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
                *map(ctypes.c_int, (len(eos), n, ring_size, 0 if fill == "pad" else REPEAT, slots)),
            )
        for slot, decode in enumerate(decodes):
            if decode.finish == "closed":
                decode.take(next_ids[slot].tolist(), int(accepted[slot]))
            tokens = [token for record in decode.records for token in record.new]
            assert ring[slot, : emitted[slot]].tolist() == tokens
            assert bool(committed[slot]) == (decode.finish == "closed")
            if decode.finish == "closed":
                assert blocks[slot].tolist() == decode.next_block(n).tokens
                assert write_index[slot] == decode.write_index


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


@pytest.mark.parametrize(("slots", "k"), [(1, 1), (1, 4), (3, 8)])
@pytest.mark.parametrize("cuda", CUDA)
def test_tokens_are_those_of_the_loop_on_the_host_with_fewer_waits(
    bundle: Bundle, tmp_path: Path, cuda: str, slots: int, k: int
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
            compiler=simulated.compiler(tmp_path, cuda),
        ) as loop:
            for _ in range(2):  # enqueued and captured, then replayed
                result = loop.run(prompts, max_new_tokens=50, eos_token_ids=(), fill_token=None)
                assert result.token_ids == expected
                assert result.num_forwards >= result.num_syncs
                assert result.num_syncs <= -(-50 // k)
            ended = loop.run(prompts, max_new_tokens=50, eos_token_ids={expected[0][4]}, fill_token=0)
            assert ended.token_ids[0] == expected[0][: expected[0].index(expected[0][4]) + 1]
        assert decode_on_host(engine, prompts, "jacobi", BLOCK_SIZE, count=50) == expected, (
            "the loop left the engine changed"
        )
    assert simulated.cuda.is_empty()
    assert not simulated.driver.behaviour.modules


def test_a_run_up_to_the_end_of_the_cache_stays_inside_it(bundle: Bundle, tmp_path: Path):
    """The last graphs hold fewer forwards; the simulation fails on a row outside the cache."""
    simulated = SimulatedGpu()
    plan = build_plan(bundle, PlanOptions(block_sizes=(BLOCK_SIZE,)), gpu=simulated.gpu)
    with TrtEngine(bundle, plan=plan, gpu=simulated.gpu) as engine:
        room = engine.geometry.cache_length - BLOCK_SIZE + 1
        with DeviceLoop(
            engine, block_size=BLOCK_SIZE, compute_capability="9.0", compiler=simulated.compiler(tmp_path)
        ) as loop:
            result = loop.run([[5, 6]], max_new_tokens=room - 2, eos_token_ids=(), fill_token=0)
            assert len(result.token_ids[0]) == room - 2
            with pytest.raises(EngineError, match=f"come to {room + 1}, this engine holds {room}"):
                loop.run([[5, 6]], max_new_tokens=room - 1, eos_token_ids=(), fill_token=0)
            with pytest.raises(EngineError, match="each of 1 slots"):
                loop.run([[5], [6]], max_new_tokens=1, eos_token_ids=(), fill_token=0)
        with pytest.raises(EngineError, match="has blocks of 8, got 4"):
            DeviceLoop(engine, block_size=4, compute_capability="9.0", compiler=simulated.compiler(tmp_path))


def test_a_kernel_that_does_not_compile_is_told_in_the_compilers_words(tmp_path: Path):
    behaviour = SimulatedNvrtc(tmp_path / "missing")
    with pytest.raises(EngineError, match="NVRTC does not compile the loop's kernel: no such"):
        compile_kernel(CudaDouble(describe("cuda", CUDA[-1])["nvrtc"], behaviour), "9.0")
    assert behaviour.options == [b"--gpu-architecture=sm_90"]


@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "12.0"])
def test_the_kernel_compiles_for_real_devices(capability: str):
    library = next((BUILD / "nvrtc" / NVRTC).rglob("libnvrtc.so.*"), None)
    bindings = BUILD / "cuda" / CUDA[-1]
    if library is None or not bindings.is_dir():
        pytest.skip("NVRTC is not installed: run `make bindings`")
    code = (
        "from cuda.bindings import nvrtc\n"
        "from cllm_export.runtime.commit_kernel import compile_kernel\n"
        f"print(compile_kernel(nvrtc, {capability!r})[:4])"
    )
    paths = {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": f"{BUILD.parent}:{bindings}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == r"b'\x7fELF'", done.stderr
