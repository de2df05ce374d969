"""Runs one greedy request with the loop on the device. The host reads the outputs of every forward, but later.

The request's own decode processes every forward as if it had asked for it. So its tokens, records and end are those of
the loop on the host. This includes stop strings, which the device does not know. It is for TensorRT engines only.
"""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter
from typing import TYPE_CHECKING, cast

from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.slot import SlotMemory
from cllm_export.runtime.decoding.statistics import OnDevice
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine
from cllm_export.tensorrt.loop.device_loop import MOST_EOS, DeviceLoop, follow
from cllm_export.tensorrt.loop.launch_copy import Turn

if TYPE_CHECKING:
    from cllm_export.tensorrt.engine import TrtEngine

PROPOSERS = ("pad", "repeat")
"""Draft sources that the kernel supports."""


def require_device_loop(given: Engine, *, block_size: int, num_eos: int) -> TrtEngine:
    """The engine, if a loop with this block size can run on its device.

    Raises:
        OptionError: it is no TensorRT engine, its plan lacks this block size, or there are too many end-of-sequence
            tokens.
    """
    if not given.has_device_loop:
        raise OptionError(
            f"forwards_per_sync is for TensorRT, and this model runs on {type(given).__name__}: load its bundle with "
            "provider='tensorrt', or leave it out"
        )
    engine = cast("TrtEngine", given)
    if block_size not in engine.block_sizes:
        raise OptionError(
            f"forwards_per_sync takes a block size of the plan's, {' or '.join(map(str, engine.block_sizes))}, got "
            f"{block_size}: choose one as block_size, or build a plan with block_sizes={block_size}"
        )
    if num_eos > MOST_EOS:
        raise OptionError(f"forwards_per_sync takes {MOST_EOS} end-of-sequence tokens at most, the model has {num_eos}")
    return engine


class DeviceLoops:
    """The device loops of one engine, each made at its first use. Close it before the engine."""

    def __init__(self) -> None:
        self._loops: dict[tuple[int, int], DeviceLoop] = {}

    def find(self, engine: TrtEngine, *, block_size: int, forwards_per_sync: int) -> DeviceLoop:
        """The loop for this n and k.

        Raises:
            MissingExtraError: cuda-python is not installed.
            EngineError: the kernels of the loop do not compile or load.
        """
        key = (block_size, forwards_per_sync)
        if key not in self._loops:
            self._loops[key] = DeviceLoop(
                engine,
                block_size=block_size,
                compute_capability=engine.gpu.facts.compute_capability,
                forwards_per_sync=forwards_per_sync,
                compiler=engine.gpu.compiler,
            )
        return self._loops[key]

    def close(self) -> None:
        while self._loops:
            self._loops.popitem()[1].close()


class DeviceRequest:
    """One task in slot 0; all other slots are idle. Not thread-safe.

    Args:
        loop: the device loop of the engine.
        task: a greedy sliding Jacobi task with the proposer ``pad`` or ``repeat``.
        num_slots: number of slots of the engine.
        max_new_tokens, eos_token_ids: the values of the task's decode.
        proposed_token: fills unknown rows of a block. None fills them with the token before them.
        memory: restores the slot's KV from a prefix cache, and keeps it there; None without a cache.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        task: Task,
        *,
        num_slots: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        proposed_token: int | None,
        memory: SlotMemory | None,
    ) -> None:
        self._loop = loop
        self._task = task
        self._prompts = [task.prompt, *[[] for _ in range(num_slots - 1)]]
        self._memory = memory
        self._launches: Generator[list[list[Turn]]] = loop.decode(
            self._prompts, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, proposed_token=proposed_token
        )
        self._before = (loop.num_forwards, loop.num_syncs)
        self._has_read = False
        self._is_sound = True

    @property
    def is_idle(self) -> bool:
        """Whether the task has finished."""
        return self._task.decode.is_finished

    def step(self) -> None:
        """The first step prefills the prompt. Each later step waits for a launch and takes its outputs.

        Raises:
            EngineError: the engine failed, or the device ended the request but the host did not.
        """
        self._is_sound = False
        if self._has_read:
            self._take_launch()
        else:
            self._read()
        self._is_sound = True

    def _read(self) -> None:
        started, task = perf_counter(), self._task
        if self._memory:
            task.reused_tokens = self._memory.restore(task.prompt[:-1])
        self._loop.read(self._prompts, num_known=task.reused_tokens)
        self._has_read = True
        task.prefill_seconds += perf_counter() - started

    def _take_launch(self) -> None:
        started, task = perf_counter(), self._task
        turns = next(self._launches, None)
        task.engine_seconds += perf_counter() - started
        if turns is None:
            raise EngineError("the loop on the device ended a request that has not ended by its rules")
        new = follow(task.decode, turns[0], self._loop.block_size)
        task.decode_seconds += perf_counter() - started
        if new:
            task.give(new)

    def cancel(self, task: Task) -> None:
        """Wait until the device has run the launches in flight, and store the text's KV rows in the prefix cache."""
        started = perf_counter()
        self._launches.close()
        task.decode_seconds += perf_counter() - started
        forwards, syncs = self._before
        task.on_device = OnDevice(
            num_forwards=self._loop.num_forwards - forwards,
            num_syncs=self._loop.num_syncs - syncs,
            form=self._loop.form,
            form_reason=self._loop.form_reason,
        )
        if self._memory and self._has_read and self._is_sound:
            self._memory.keep([*task.prompt, *task.token_ids][: task.decode.num_rows])
