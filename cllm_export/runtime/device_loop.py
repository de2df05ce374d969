"""Sliding Jacobi decoding that stays on the device: several forwards for one wait of the host.

Between two forwards a kernel accepts, emits tokens into a ring, cuts at the limit and at an end of sequence, and writes
the next block where the next forward reads it. The host launches one CUDA graph of up to k forwards, waits, and reads
what came into the ring. The graph is a WHILE node around one forward, which ends with the last request, or where CUDA
does not take that, k forwards in a row, the slots that ended idling for the rest. Greedy requests alone, one a slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from cllm_export.contract import require_at_least
from cllm_export.cuda import Cuda
from cllm_export.errors import EngineError, OptionError, WhileGraphError
from cllm_export.runtime import commit_kernel, condition_kernel
from cllm_export.runtime.commit_kernel import REPEAT
from cllm_export.runtime.device_buffers import DeviceMemory
from cllm_export.runtime.device_kernel import Compiler, DeviceKernel, import_compiler
from cllm_export.runtime.trt_engine import TrtEngine
from cllm_export.runtime.while_graph import WhileGraph, require_while_nodes

INT32 = 4
THREADS = 32
"""Slots a thread block commits: they are few, and none waits for another."""

Form = Literal["conditional", "unrolled"]
AskedForm = Literal["auto", "conditional", "unrolled"]


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What a run gave."""

    token_ids: list[list[int]]
    """New tokens of each slot, the end of sequence included where one was reached."""
    num_forwards: int
    """Enqueued; in the unrolled form the idle ones at the end of a graph included."""
    num_syncs: int
    """Times the host waited for the device while decoding."""
    form: Form
    """What the graphs were that ran: a WHILE node around a forward, or k forwards in a row."""
    form_reason: str | None
    """Why ``auto`` came to the unrolled form; None where the form is the one that was asked for."""

    @property
    def syncs_per_token(self) -> float:
        return self.num_syncs / max(1, sum(map(len, self.token_ids)))


class LoopGraph(Protocol):
    """What was recorded of a loop."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class UnrolledGraph:
    """What a function enqueues, recorded once and launched as one."""

    def __init__(self, cuda: Cuda, stream: Any, enqueue: Callable[[], None]) -> None:
        self._cuda, self._stream = cuda, stream
        with cuda.capture(stream) as captured:
            enqueue()
        self._graph = captured[0]

    def launch(self) -> None:
        self._cuda.launch(self._graph, self._stream)

    def close(self) -> None:
        self._cuda.destroy_graph(self._graph)


class _Recording(NamedTuple):
    """What a recorded graph follows from."""

    form: Form
    length: int
    """Forwards: all of them, or the most that a WHILE node runs."""
    extent: int
    num_eos: int
    fill: int


class DeviceLoop:
    """Decodes one prompt a slot with an engine's own buffers. Close it before the engine, or use it in a ``with``.

    Args:
        engine: a TensorRT engine; nobody else may use it meanwhile.
        block_size: n, one of the plan's.
        compute_capability: of the device, as ``GpuFacts`` has it.
        forwards_per_sync: k, at most; fewer are run where k blocks would not fit the cache.
        form: ``conditional`` is a WHILE node around one forward, ``unrolled`` k forwards in a row, ``auto`` the former
            where driver, runtime and the recorded forward allow it. ``form_reason`` says why not.
        compiler: ``nvrtc`` and ``driver`` of cuda-python.

    Raises:
        OptionError: no such form.
        EngineError: the plan has no such block size, or a kernel does not compile or load.
        WhileGraphError: ``conditional``, and CUDA is too old for it; from ``run``, or does not take the forward.
    """

    def __init__(
        self,
        engine: TrtEngine,
        *,
        block_size: int,
        compute_capability: str,
        forwards_per_sync: int = 8,
        form: AskedForm = "auto",
        compiler: Compiler | None = None,
    ) -> None:
        require_at_least("forwards_per_sync", forwards_per_sync, 1)
        if block_size not in engine.block_sizes:
            raise EngineError(f"this plan has blocks of {', '.join(map(str, engine.block_sizes))}, got {block_size}")
        if form not in get_args(AskedForm):
            raise OptionError(f"form is one of {', '.join(get_args(AskedForm))}, got {form!r}")
        self._asked = form
        self._form: Form = "unrolled"
        self._form_reason: str | None = None
        self._engine, self._size, self._most = engine, block_size, forwards_per_sync
        self._ring_size = forwards_per_sync * block_size
        self._graphs: dict[_Recording, LoopGraph] = {}
        with contextlib.ExitStack() as owned:

            def load(kernel: ModuleType) -> DeviceKernel:
                return DeviceKernel(
                    compiler or import_compiler(),
                    source=kernel.SOURCE,
                    name=kernel.NAME,
                    kinds=kernel.KINDS,
                    compute_capability=compute_capability,
                    owned=owned,
                )

            self._commit_kernel = load(commit_kernel)
            if form != "unrolled":
                self._prepare_while(lambda: load(condition_kernel))
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
            self._launch(int(self._host["write_index"].array.max()), len(eos_token_ids), fill_token)
            engine.cuda.synchronize(engine.stream)
            num_forwards, num_syncs = num_forwards + int(self._host["forwards"].array[0]), num_syncs + 1
            self._read_ring(tokens)
        return LoopResult(
            token_ids=tokens,
            num_forwards=num_forwards,
            num_syncs=num_syncs,
            form=self._form,
            form_reason=self._form_reason,
        )

    @property
    def form(self) -> Form:
        """The form that the next graph is recorded in."""
        return self._form

    @property
    def form_reason(self) -> str | None:
        """As ``LoopResult.form_reason``."""
        return self._form_reason

    def _prepare_while(self, load: Callable[[], DeviceKernel]) -> None:
        """Take the conditional form if this CUDA has it; what the forward holds is known when it is recorded."""
        try:
            require_while_nodes(self._engine.cuda)
            self._condition_kernel = load()
        except EngineError as error:  # NVRTC may be older than the driver
            self._fall_back(error)
        else:
            self._form = "conditional"

    def _fall_back(self, reason: EngineError) -> None:
        if self._asked == "conditional":
            raise reason
        self._form, self._form_reason = "unrolled", str(reason)

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
        counts = {"left": slots, "emitted": slots, "ring": slots * self._ring_size, "eos": 256, "forwards": 1}
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

    def _launch(self, write_index: int, num_eos: int, fill_token: int | None) -> None:
        """Enqueue as many forwards as may be, each with its commit, and the copies of what they gave."""
        engine = self._engine
        count = min(self._most, (engine.geometry.cache_length - write_index) // self._size)
        extent = engine.extent_for(write_index + count * self._size)
        fill = REPEAT if fill_token is None else fill_token
        recording = _Recording(self._form, self._most if self._form == "conditional" else count, extent, num_eos, fill)
        if recording in self._graphs:
            self._replay(recording)
        else:  # as TensorRT must have run what is recorded for the next time; a WHILE node holds one forward
            count = 1 if self._form == "conditional" else count
            self._enqueue(recording._replace(length=count))
            self._host["forwards"].array[0] = count
            self._record(recording)
        for name in ("ring", "emitted", "left", "write_index"):
            self._copy(name, to_device=False)

    def _replay(self, recording: _Recording) -> None:
        engine = self._engine
        if recording.form == "unrolled":
            self._host["forwards"].array[0] = recording.length
            self._graphs[recording].launch()
            return
        engine.cuda.clear(self._addresses["forwards"], INT32, engine.stream)
        self._graphs[recording].launch()
        self._copy("forwards", to_device=False)

    def _record(self, recording: _Recording) -> None:
        """Record what a later launch replays, running nothing. A forward that no WHILE node takes leaves nothing."""
        cuda, stream = self._engine.cuda, self._engine.stream
        if recording.form == "unrolled":
            self._graphs[recording] = UnrolledGraph(cuda, stream, lambda: self._enqueue(recording))
            return
        try:
            self._graphs[recording] = WhileGraph(cuda, stream, lambda handle: self._enqueue_body(recording, handle))
        except WhileGraphError as error:
            self._fall_back(error)

    def _enqueue(self, recording: _Recording) -> None:
        for _ in range(recording.length):
            self._enqueue_forward(recording)

    def _enqueue_body(self, recording: _Recording, handle: int) -> None:
        self._enqueue_forward(recording)
        pointers = (self._addresses[name] for name in condition_kernel.POINTERS)
        numbers = (self._size, recording.extent, recording.length, self._engine.num_slots)
        self._condition_kernel.launch(self._engine.stream, (*pointers, *numbers, handle))

    def _enqueue_forward(self, recording: _Recording) -> None:
        """A forward and its commit."""
        slots = self._engine.num_slots
        self._engine.enqueue_decode(self._size, recording.extent)
        pointers = (self._addresses[name] for name in commit_kernel.POINTERS)
        numbers = (recording.num_eos, self._size, self._ring_size, recording.fill, slots)
        values = (*pointers, *numbers)
        self._commit_kernel.launch(self._engine.stream, values, blocks=-(-slots // THREADS), threads=THREADS)

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
            graph.close()
        self._graphs.clear()
