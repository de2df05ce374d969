"""Sliding Jacobi decoding that stays on the device: several forwards for one wait of the host.

Between two forwards a kernel accepts, emits tokens into a ring, cuts at the limit and at an end of sequence, and writes
the next block where the next forward reads it. The host captures k forwards as one CUDA graph, launches it, waits, and
reads what came into the ring; a slot that ended in between idles for the rest. Greedy requests alone, one a slot.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_export.contract import require_at_least
from cllm_export.errors import EngineError
from cllm_export.runtime.commit_kernel import NAME, REPEAT, compile_kernel, import_compiler
from cllm_export.runtime.device_buffers import DeviceMemory
from cllm_export.runtime.trt_engine import TrtEngine

INT32 = 4
THREADS = 32
"""Slots a thread block commits: they are few, and none waits for another."""

_POINTERS = (
    "next_ids",
    "num_accepted",
    "input_ids",
    "num_committed",
    "write_index",
    "left",
    "emitted",
    "ring",
    "eos",
)
"""The kernel's pointers, in its order; the first five are the engine's own buffers."""


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What a run gave."""

    token_ids: list[list[int]]
    """New tokens of each slot, the end of sequence included where one was reached."""
    num_forwards: int
    """Enqueued, idle ones at the end of a graph included."""
    num_syncs: int
    """Times the host waited for the device while decoding."""

    @property
    def syncs_per_token(self) -> float:
        return self.num_syncs / max(1, sum(map(len, self.token_ids)))


class DeviceLoop:
    """Decodes one prompt a slot with an engine's own buffers. Close it before the engine, or use it in a ``with``.

    Args:
        engine: a TensorRT engine; nobody else may use it meanwhile.
        block_size: n, one of the plan's.
        compute_capability: of the device, as ``GpuFacts`` has it.
        forwards_per_sync: k, at most; fewer are run where k blocks would not fit the cache.
        compiler: ``nvrtc`` and ``driver`` of cuda-python.

    Raises:
        EngineError: the plan has no such block size, or the kernel does not compile or load.
    """

    def __init__(
        self,
        engine: TrtEngine,
        *,
        block_size: int,
        compute_capability: str,
        forwards_per_sync: int = 8,
        compiler: tuple[Any, Any] | None = None,
    ) -> None:
        require_at_least("forwards_per_sync", forwards_per_sync, 1)
        if block_size not in engine.block_sizes:
            raise EngineError(f"this plan has blocks of {', '.join(map(str, engine.block_sizes))}, got {block_size}")
        nvrtc, self._driver = compiler or import_compiler()
        self._engine, self._size, self._most = engine, block_size, forwards_per_sync
        self._ring_size = forwards_per_sync * block_size
        self._graphs: dict[tuple[int, int, int, int], Any] = {}
        with contextlib.ExitStack() as owned:
            module = self._drive("cuModuleLoadData", compile_kernel(nvrtc, compute_capability))
            owned.callback(self._drive, "cuModuleUnload", module)
            self._kernel = self._drive("cuModuleGetFunction", module, NAME)
            self._allocate(DeviceMemory(engine.cuda, owned))
            owned.callback(self._drop_graphs)
            self._owned = owned.pop_all()

    def __enter__(self) -> DeviceLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the loop holds; the engine stays."""
        self._owned.close()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        fill_token: int | None,
    ) -> LoopResult:
        """Decode a prompt in each slot; ``fill_token`` None repeats the token before the fill.

        Raises:
            EngineError: not one prompt a slot, one that does not fit, or the engine failed.
        """
        engine = self._engine
        self._check(prompts, max_new_tokens, eos_token_ids)
        write_index = self._prefill(prompts)
        self._start(prompts, write_index, max_new_tokens, sorted(eos_token_ids), fill_token)
        tokens: list[list[int]] = [[] for _ in prompts]
        num_forwards = num_syncs = 0
        while self._host["left"].array.any():
            count = self._launch(int(self._host["write_index"].array.max()), len(eos_token_ids), fill_token)
            engine.cuda.synchronize(engine.stream)
            num_forwards, num_syncs = num_forwards + count, num_syncs + 1
            self._read_ring(tokens)
        return LoopResult(token_ids=tokens, num_forwards=num_forwards, num_syncs=num_syncs)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids: Collection[int]) -> None:
        engine = self._engine
        require_at_least("max_new_tokens", max_new_tokens, 1)
        if len(prompts) != engine.num_slots or not all(prompts):
            raise EngineError(f"a run needs a prompt of a token or more for each of {engine.num_slots} slots")
        room = engine.geometry.cache_length - self._size + 1
        if (longest := max(map(len, prompts)) + max_new_tokens) > room:
            raise EngineError(f"prompt and new tokens come to {longest}, this engine holds {room} with this block size")
        if len(eos_token_ids) > self._host["eos"].array.size:
            raise EngineError(
                f"at most {self._host['eos'].array.size} end-of-sequence tokens, got {len(eos_token_ids)}"
            )

    def _allocate(self, memory: DeviceMemory) -> None:
        slots, size = self._engine.num_slots, self._size
        counts = {"left": slots, "emitted": slots, "ring": slots * self._ring_size, "eos": 256}
        self._host = {name: memory.host(count, np.dtype(np.int32)) for name, count in counts.items()}
        self._addresses = self._engine.addresses
        self._addresses |= {name: memory.device(count * INT32) for name, count in counts.items()}
        for name, count in {"input_ids": slots * size, "num_committed": slots, "write_index": slots}.items():
            self._host[name] = memory.host(count, np.dtype(np.int64))

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Write the KV of every prompt less its last token, slot by slot; where each slot then stands."""
        engine, written = self._engine, [0] * len(prompts)
        for slot, prompt in enumerate(prompts):
            for start in range(0, len(prompt) - 1, engine.prefill_chunk):
                chunk = list(prompt[:-1][start : start + engine.prefill_chunk])
                padded = chunk + [0] * (engine.prefill_chunk - len(chunk)) if engine.fixed_shapes else chunk
                committed = [len(chunk) if each == slot else 0 for each in range(len(prompts))]
                engine.prefill([padded] * len(prompts), committed, written)
                written[slot] += len(chunk)
        return written

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        write_index: list[int],
        max_new_tokens: int,
        eos_token_ids: list[int],
        fill_token: int | None,
    ) -> None:
        host, size = self._host, self._size
        blocks = [[prompt[-1]] + [prompt[-1] if fill_token is None else fill_token] * (size - 1) for prompt in prompts]
        host["input_ids"].array[:] = np.array(blocks, np.int64).ravel()
        host["num_committed"].array[:] = 1
        host["write_index"].array[:] = write_index
        host["left"].array[:] = max_new_tokens
        host["emitted"].array[:] = 0
        host["eos"].array[: len(eos_token_ids)] = eos_token_ids
        for name in ("input_ids", "num_committed", "write_index", "left", "emitted", "eos"):
            self._copy(name, to_device=True)
        self._engine.cuda.synchronize(self._engine.stream)

    def _launch(self, write_index: int, num_eos: int, fill_token: int | None) -> int:
        """Enqueue as many forwards as may be, each with its commit, and the copies of what they gave; how many."""
        engine = self._engine
        count = min(self._most, (engine.geometry.cache_length - write_index) // self._size)
        extent = engine.extent_for(write_index + count * self._size)
        fill = REPEAT if fill_token is None else fill_token
        key = (count, extent, num_eos, fill)
        if key in self._graphs:
            engine.cuda.launch(self._graphs[key], engine.stream)
            return count
        self._enqueue(*key)
        with engine.cuda.capture(engine.stream) as captured:  # records the same again, and runs nothing
            self._enqueue(*key)
        self._graphs[key] = captured[0]
        return count

    def _enqueue(self, count: int, extent: int, num_eos: int, fill: int) -> None:
        for _ in range(count):
            self._engine.enqueue_decode(self._size, extent)
            self._commit(num_eos, fill)
        for name in ("ring", "emitted", "left", "write_index"):
            self._copy(name, to_device=False)

    def _commit(self, num_eos: int, fill: int) -> None:
        slots = self._engine.num_slots
        numbers = (num_eos, self._size, self._ring_size, fill, slots)
        values = (*(self._addresses[name] for name in _POINTERS), *numbers)
        kinds = (ctypes.c_void_p,) * len(_POINTERS) + (ctypes.c_int,) * len(numbers)
        grid = -(-slots // THREADS)
        stream = int(self._engine.stream)
        self._drive("cuLaunchKernel", self._kernel, grid, 1, 1, THREADS, 1, 1, 0, stream, (values, kinds), 0)

    def _copy(self, name: str, *, to_device: bool) -> None:
        engine, host, device = self._engine, self._host[name], self._addresses[name]
        if to_device:
            engine.cuda.copy(device, host.address, host.array.nbytes, "to device", engine.stream)
        else:
            engine.cuda.copy(host.address, device, host.array.nbytes, "to host", engine.stream)

    def _read_ring(self, tokens: list[list[int]]) -> None:
        """What each slot emitted since the last wait, at most as many as the ring holds."""
        rings = self._host["ring"].array.reshape(len(tokens), self._ring_size)
        for slot, emitted in enumerate(self._host["emitted"].array.tolist()):
            places = range(len(tokens[slot]), emitted)
            tokens[slot] += [int(rings[slot, place % self._ring_size]) for place in places]

    def _drop_graphs(self) -> None:
        self._engine.cuda.synchronize(self._engine.stream)
        for graph in self._graphs.values():
            self._engine.cuda.destroy_graph(graph)
        self._graphs.clear()

    def _drive(self, name: str, *arguments: Any) -> Any:
        """A call of the driver, checked."""
        code, *values = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed: {code!r}")
        return values[0] if values else None
