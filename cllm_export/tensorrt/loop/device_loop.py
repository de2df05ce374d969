"""Sliding Jacobi decoding on the device: several forwards per wait of the host.

Between two forwards a kernel accepts tokens and records the outputs in a ring. It cuts at the length limit and at an
end-of-sequence token, and writes the next block where the next forward reads it.

The host launches CUDA graphs of up to k forwards. One launch runs ahead of the launch that the host waits for, so the
device works while the host reads outputs from the ring. A graph is a WHILE node around one forward, and ends with the
last request. If CUDA does not support that, it is k forwards in a row, in which slots that have ended are idle. It is
for greedy requests only, one per slot.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from cllm_export.bundle.contract import Batch
from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, OptionError, WhileGraphError
from cllm_export.runtime.decoding.request import Decode, make_decoder
from cllm_export.runtime.engines.cuda import Cuda
from cllm_export.tensorrt.device_buffers import DeviceMemory
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.loop import commit_kernel, condition_kernel
from cllm_export.tensorrt.loop.commit_kernel import REPEAT
from cllm_export.tensorrt.loop.device_kernel import Compiler, DeviceKernel, import_compiler
from cllm_export.tensorrt.loop.launch_copy import LaunchCopy, Turn
from cllm_export.tensorrt.loop.while_graph import WhileGraph, require_while_nodes

INT32 = 4
THREADS = 32
"""Slots per CUDA thread block of the commit kernel. Slots are few, and none waits for another."""
MOST_EOS = 256
"""Largest number of end-of-sequence tokens."""
LAUNCHES = 2
"""Launches in flight: the one that the host waits for, and the next one, which keeps the device busy."""

Form = Literal["conditional", "unrolled"]
AskedForm = Literal["auto", "conditional", "unrolled"]


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """The result of a run."""

    token_ids: list[list[int]]
    """New tokens of each slot, including the end-of-sequence token if one was reached."""
    num_forwards: int
    """Number of forwards, including those that ran after every request had ended."""
    num_syncs: int
    """How often the host waited for the device while decoding."""
    form: Form
    """Form of the graphs: a WHILE node around a forward, or k forwards in a row."""
    form_reason: str | None
    """The reason why ``auto`` chose the unrolled form; None otherwise."""

    @property
    def syncs_per_token(self) -> float:
        return self.num_syncs / max(1, sum(map(len, self.token_ids)))


class LoopGraph(Protocol):
    """A recorded graph of the loop."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class UnrolledGraph:
    """The work that a function enqueues, recorded once and launched as one graph."""

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
    """The key of a recorded graph: the values that determine it."""

    form: Form
    length: int
    """Number of forwards. For a WHILE node it is the largest number."""
    kv_length: int
    num_eos: int
    proposed_token: int


class _Flight(NamedTuple):
    """A launch in flight."""

    copy: LaunchCopy
    least: int
    """Number of forwards that a slot surely gets if its request does not end in this launch."""
    most_rows: int
    """Largest number of KV rows that the launch adds to a slot."""
    num_forwards: int | None
    """None if the device counts the forwards."""


class _Rules(NamedTuple):
    """The end-of-sequence tokens and the proposed token of a run."""

    num_eos: int
    proposed_token: int


class DeviceLoop:
    """Decodes one prompt per slot in the engine's own buffers. Close it before the engine, or use it in a ``with``.

    Attributes:
        num_forwards, num_syncs: as in ``LoopResult``, summed over all runs so far.

    Args:
        engine: a TensorRT engine. Nothing else may use it during a run.
        block_size: n, one of the plan's block sizes.
        compute_capability: that of the device, in the form of ``GpuFacts``.
        forwards_per_sync: k, the largest number of forwards per launch. It is smaller if k blocks do not fit into the
            cache.
        form: ``conditional`` is a WHILE node around one forward. ``unrolled`` is k forwards in a row. ``auto`` is the
            former if driver, runtime and the recorded forward allow it. If not, ``form_reason`` says why.
        compiler: ``nvrtc`` and ``driver`` of cuda-python.

    Raises:
        OptionError: there is no such form.
        EngineError: the plan has no such block size, or a kernel does not compile or load.
        WhileGraphError: the form is ``conditional``, and CUDA is too old for it. ``run`` raises it if CUDA refuses the
            forward.
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
        self.num_forwards = self.num_syncs = 0
        self._num_launches = 0
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
            self._allocate(owned)
            owned.callback(self._drop_graphs)
            self._owned = owned.pop_all()

    def __enter__(self) -> DeviceLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory of the loop. The engine stays open."""
        self._owned.close()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        proposed_token: int | None,
    ) -> LoopResult:
        """Decode a prompt in each slot.

        ``proposed_token`` fills unknown rows of a block. None fills them with the token before them.

        Raises:
            EngineError: there is not one prompt per slot, a prompt is empty or does not fit, or the engine failed.
        """
        if not all(prompts):
            raise EngineError("a run needs a prompt of a token or more for each slot, and one is empty")
        self._check(prompts, max_new_tokens, eos_token_ids)
        forwards, syncs = self.num_forwards, self.num_syncs
        proposer = "repeat" if proposed_token is None else "pad"
        decodes = [
            Decode(
                make_decoder("jacobi", prompt, proposer=proposer, seed=0, pad_token_id=proposed_token or 0),
                max_new_tokens=max_new_tokens,
                eos_token_ids=eos_token_ids,
            )
            for prompt in prompts
        ]
        self.read(prompts)
        for turns in self.decode(
            prompts, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, proposed_token=proposed_token
        ):
            for decode, of_slot in zip(decodes, turns, strict=True):
                follow(decode, of_slot, self._size)
        return LoopResult(
            token_ids=[[token for record in decode.records for token in record.new] for decode in decodes],
            num_forwards=self.num_forwards - forwards,
            num_syncs=self.num_syncs - syncs,
            form=self._form,
            form_reason=self._form_reason,
        )

    def read(self, prompts: Sequence[Sequence[int]], *, num_known: int = 0) -> None:
        """Write the KV of every prompt without its last token, slot by slot. ``num_known`` rows are already there.

        Raises:
            EngineError: the engine failed.
        """
        engine, written = self._engine, [num_known if prompt else 0 for prompt in prompts]
        for slot, prompt in enumerate(prompts):
            for start in range(written[slot], len(prompt) - 1, engine.prefill_chunk):
                chunk = list(prompt[:-1][start : start + engine.prefill_chunk])
                padded = chunk + [0] * (engine.prefill_chunk - len(chunk)) if engine.fixed_shapes else chunk
                committed = [len(chunk) if each == slot else 0 for each in range(len(prompts))]
                engine.prefill(Batch([padded] * len(prompts), committed, written))
                written[slot] += len(chunk)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        proposed_token: int | None,
    ) -> Generator[list[list[Turn]]]:
        """Decode prompts that ``read`` has prefilled. An empty prompt leaves its slot idle.

        It yields the outputs of each launch, for each slot. To stop early, close the generator: it waits for the
        launches in flight and discards their outputs.

        Raises:
            EngineError: there is not one prompt per slot, a prompt does not fit, or the engine failed.
        """
        self._check(prompts, max_new_tokens, eos_token_ids)
        self._start(prompts, max_new_tokens, sorted(eos_token_ids), proposed_token)
        rules = _Rules(len(eos_token_ids), REPEAT if proposed_token is None else proposed_token)
        flights: deque[_Flight] = deque()
        try:
            while True:
                while len(flights) < LAUNCHES and (flight := self._try_launch(flights, rules)):
                    flights.append(flight)
                if not flights:
                    return
                yield self._collect(flights.popleft())
        finally:
            for flight in flights:
                self._collect(flight)

    @property
    def block_size(self) -> int:
        return self._size

    @property
    def form(self) -> Form:
        """The form that the next graph is recorded in."""
        return self._form

    @property
    def form_reason(self) -> str | None:
        """See ``LoopResult.form_reason``."""
        return self._form_reason

    def _prepare_while(self, load: Callable[[], DeviceKernel]) -> None:
        """Choose the conditional form if this CUDA supports it. The forward itself is checked when it is recorded."""
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
        if len(prompts) != engine.num_slots:
            raise EngineError(f"a run needs a prompt for each of {engine.num_slots} slots, got {len(prompts)}")
        room = engine.geometry.cache_length - self._size + 1
        if (longest := max(map(len, prompts)) + max_new_tokens) > room:
            raise EngineError(f"prompt and new tokens come to {longest}, this engine holds {room} with this block size")
        if len(eos_token_ids) > MOST_EOS:
            raise EngineError(f"at most {MOST_EOS} end-of-sequence tokens, got {len(eos_token_ids)}")

    def _allocate(self, owned: contextlib.ExitStack) -> None:
        engine, slots = self._engine, self._engine.num_slots
        memory = DeviceMemory(engine.cuda, owned)
        ring = slots * self._most * (1 + self._size)
        counts = {"left": slots, "turns": slots, "ring": ring, "eos": MOST_EOS, "forwards": 1}
        self._addresses = engine.addresses
        self._addresses |= {name: memory.device(count * INT32) for name, count in counts.items()}
        given = {"left": slots, "turns": slots, "eos": MOST_EOS}
        self._given = {name: memory.host(count, np.dtype(np.int32)) for name, count in given.items()}
        for name, count in {"input_ids": slots * self._size, "num_committed": slots, "write_index": slots}.items():
            self._given[name] = memory.host(count, np.dtype(np.int64))
        copied: dict[str, tuple[int, type]] = {
            name: (counts[name], np.int32) for name in ("left", "turns", "ring", "forwards")
        }
        copied["write_index"] = (slots, np.int64)
        self._copies = [LaunchCopy(engine.cuda, owned, copied) for _ in range(LAUNCHES)]

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_token_ids: list[int],
        proposed_token: int | None,
    ) -> None:
        """Enqueue copies of the first blocks, and of the other state of the requests, to the device."""
        given, size, is_running = self._given, self._size, [bool(prompt) for prompt in prompts]
        lasts = [prompt[-1] if prompt else 0 for prompt in prompts]
        blocks = [[last] + [last if proposed_token is None else proposed_token] * (size - 1) for last in lasts]
        given["input_ids"].array[:] = np.array(blocks, np.int64).ravel()
        given["num_committed"].array[:] = is_running
        given["write_index"].array[:] = [max(0, len(prompt) - 1) for prompt in prompts]
        given["left"].array[:] = np.multiply(is_running, max_new_tokens)
        given["turns"].array[:] = 0
        given["eos"].array[: len(eos_token_ids)] = eos_token_ids
        cuda, stream = self._engine.cuda, self._engine.stream
        for name, host in given.items():
            cuda.copy(self._addresses[name], host.address, host.array.nbytes, "to device", stream)
        self._num_read = [0] * len(prompts)
        self._left = int(given["left"].array.max())
        self._end = int(given["write_index"].array.max())

    def _try_launch(self, flights: Collection[_Flight], rules: _Rules) -> _Flight | None:
        """Enqueue a graph of as many forwards as possible.

        It returns None if every request has ended, or surely ends in the launches in flight. It also returns None if
        these launches may fill the cache, or if the graph is not recorded yet while they run. A graph is recorded only
        after one eager forward of the same shape: a TensorRT context may change its shape only while it is idle.
        """
        left = self._left - sum(flight.least for flight in flights)  # a forward gives at least one token
        if left <= 0:
            return None
        start = self._end + sum(flight.most_rows for flight in flights)
        count = min(self._most, (self._engine.geometry.cache_length - start) // self._size)
        if flights and count < 1:
            return None
        if self._form == "conditional":  # the graph's length is always k; it ends with the last request
            length, count = self._most, min(count, left)
        else:
            length = count
        kv_length = self._engine.kv_length_for(start + count * self._size)
        recording = _Recording(self._form, length, kv_length, *rules)
        if recording in self._graphs:
            return self._replay(recording, count)
        return None if flights else self._enqueue_new(recording)

    def _replay(self, recording: _Recording, count: int) -> _Flight:
        cuda, stream = self._engine.cuda, self._engine.stream
        is_counted = recording.form == "conditional"
        if is_counted:
            cuda.clear(self._addresses["forwards"], INT32, stream)
        self._graphs[recording].launch()
        return _Flight(self._copy_out(), count, recording.length * self._size, None if is_counted else count)

    def _enqueue_new(self, recording: _Recording) -> _Flight:
        """Run the work eagerly, then record it for the next time. TensorRT must run a shape once before it is recorded.

        For a WHILE node this runs the one forward of its body.
        """
        count = 1 if recording.form == "conditional" else recording.length
        self._enqueue_all(recording._replace(length=count))
        flight = _Flight(self._copy_out(), count, count * self._size, count)
        self._record(recording)
        return flight

    def _copy_out(self) -> LaunchCopy:
        copy = self._copies[self._num_launches % LAUNCHES]
        self._num_launches += 1
        copy.enqueue(self._addresses, self._engine.stream)
        return copy

    def _collect(self, flight: _Flight) -> list[list[Turn]]:
        """Wait for a launch, and return the outputs of its forwards for each slot."""
        copy = flight.copy
        copy.wait()
        self.num_syncs += 1
        self.num_forwards += int(copy["forwards"][0]) if flight.num_forwards is None else flight.num_forwards
        self._left, self._end = int(copy["left"].max()), int(copy["write_index"].max())
        read = self._num_read
        turns = [
            copy.read_turns(slot, first, ring_size=self._most, block_size=self._size) for slot, first in enumerate(read)
        ]
        self._num_read = [first + len(of_slot) for first, of_slot in zip(read, turns, strict=True)]
        if self._left and not any(turns):  # without progress, launches would go on forever
            raise EngineError("the device tells of requests that go on, and of no forward that was for them")
        return turns

    def _record(self, recording: _Recording) -> None:
        """Record a graph for later launches, without running it. If a WHILE node refuses the forward, fall back."""
        cuda, stream = self._engine.cuda, self._engine.stream
        if recording.form == "unrolled":
            self._graphs[recording] = UnrolledGraph(cuda, stream, lambda: self._enqueue_all(recording))
            return
        try:
            self._graphs[recording] = WhileGraph(cuda, stream, lambda handle: self._enqueue_body(recording, handle))
        except WhileGraphError as error:
            self._fall_back(error)

    def _enqueue_all(self, recording: _Recording) -> None:
        for _ in range(recording.length):
            self._enqueue_forward(recording)

    def _enqueue_body(self, recording: _Recording, handle: int) -> None:
        self._enqueue_forward(recording)
        pointers = (self._addresses[name] for name in condition_kernel.POINTERS)
        numbers = (self._size, recording.kv_length, recording.length, self._engine.num_slots)
        self._condition_kernel.launch(self._engine.stream, (*pointers, *numbers, handle))

    def _enqueue_forward(self, recording: _Recording) -> None:
        """Enqueue a forward and its commit kernel."""
        slots = self._engine.num_slots
        self._engine.enqueue_decode(self._size, recording.kv_length)
        pointers = (self._addresses[name] for name in commit_kernel.POINTERS)
        numbers = (recording.num_eos, self._size, self._most, recording.proposed_token, slots)
        values = (*pointers, *numbers)
        self._commit_kernel.launch(self._engine.stream, values, blocks=-(-slots // THREADS), threads=THREADS)

    def _drop_graphs(self) -> None:
        self._engine.cuda.synchronize(self._engine.stream)
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()


def follow(decode: Decode, turns: Sequence[Turn], block_size: int) -> list[int]:
    """Let a request's decode process the outputs of device forwards, as if it had asked for them.

    Returns the new tokens. Outputs after the request's end are discarded: the device does not know stop strings, so it
    may run on.
    """
    new: list[int] = []
    for turn in turns:
        if decode.is_finished:
            break
        decode.next_block(block_size)
        new += decode.take(turn.next_ids, turn.num_accepted)
    return new
