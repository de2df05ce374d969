"""The loops that run requests on one engine: a scheduler, the lookahead loop, or the loop on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from cllm_export.runtime.decoding.block_size.auto_sizes import AutoSizes, candidate_sizes, settle_sizes
from cllm_export.runtime.decoding.block_size.chooser import PinnedSize, SizePolicy
from cllm_export.runtime.decoding.block_size.exact_sizes import BUDGET_SECONDS, ExactSizes
from cllm_export.runtime.decoding.draft_model import DraftModel
from cllm_export.runtime.decoding.jacobi import Decoder
from cllm_export.runtime.decoding.lookahead.loop import LookaheadLoop
from cllm_export.runtime.decoding.lookahead.policy import Lookahead
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.slot import memory_of
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.options import BlockSize, ModelLimits, ResolvedRequest

if TYPE_CHECKING:
    from cllm_export.tensorrt.engine import TrtEngine
    from cllm_export.tensorrt.loop.device_request import DeviceLoops


class Loop(Protocol):
    """Runs the tasks that it was given, one forward per step."""

    @property
    def is_idle(self) -> bool: ...

    def step(self) -> object: ...

    def cancel(self, task: Task) -> object:
        """End a task early, as when its reader has gone."""
        ...


class LoopMaker:
    """Makes the loops for one engine. Not thread-safe.

    It keeps two things across requests: what ``auto`` means and the loops on the device. Each is made at its first use.

    Args:
        engine: runs the forwards.
        limits: the limits of the model.
        draft_model: serves the ``model`` proposer.
        prefix_cache: keeps the KV of prompts.
        forward_seconds: seconds of a forward by block size, if they are known.
        exact_sizes: block sizes that were compared with n = 1 on such an engine before.
        keep_sizes: takes them again, with those that were compared here.
    """

    def __init__(
        self,
        engine: Engine,
        limits: ModelLimits,
        *,
        draft_model: DraftModel | None,
        prefix_cache: PrefixCache | None,
        forward_seconds: Mapping[int, float] | None,
        exact_sizes: ExactSizes,
        keep_sizes: Callable[[ExactSizes], None],
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._draft_model = draft_model
        self._prefix_cache = prefix_cache
        self._forward_seconds = forward_seconds
        self._exact_sizes = exact_sizes
        self._keep_sizes = keep_sizes
        self._auto: AutoSizes | None = None
        self._device_loops: DeviceLoops | None = None

    def require(self, request: ResolvedRequest) -> None:
        """Check that the engine can run a request, and prepare the engine for it.

        Raises:
            OptionError: the engine cannot run it.
        """
        if request.lookahead:
            self._engine.require_lookahead()
        elif request.forwards_per_sync is not None:
            self._device_engine(request)

    def make(self, request: ResolvedRequest, task: Task, decoder: Decoder) -> Loop:
        """The loop that runs one task. The task has the engine for itself.

        Raises:
            OptionError: the engine cannot run it.
            EngineError: the engine failed.
        """
        if isinstance(decoder, Lookahead):
            return LookaheadLoop(
                self._engine,
                task,
                decoder,
                block_size=decoder.shape.max_rows,
                pad_token_id=self._limits.pad_token_id,
            )
        if request.forwards_per_sync is not None:
            return self._make_device_loop(request, task, request.forwards_per_sync)
        scheduler = self.make_scheduler(request.block_size, prefill_width=self._engine.prefill_chunk)
        scheduler.submit(task)
        return scheduler

    def make_scheduler(
        self,
        block_size: BlockSize,
        *,
        prefill_width: int | None = None,
        alternate_width: int | None = None,
        reading_widths: Sequence[int] = (),
    ) -> Scheduler:
        """A scheduler over the engine's slots; see ``Scheduler`` for the widths.

        Raises:
            EngineError: the engine failed while its forwards were timed.
        """
        return Scheduler(
            self._engine,
            block_size=self._size_policy(block_size),
            pad_token_id=self._limits.pad_token_id,
            prefill_width=prefill_width,
            alternate_width=alternate_width,
            reading_widths=reading_widths,
            drafter=self._draft_model,
            prefix_cache=self._prefix_cache,
        )

    @property
    def auto_sizes(self) -> tuple[int, ...] | None:
        """The sizes that ``auto`` chooses among; None until the first request for which n is chosen."""
        return self._auto.sizes if self._auto else None

    def close(self) -> None:
        """Free the loops on the device, before the engine is closed."""
        if self._device_loops:
            self._device_loops.close()

    def settle_auto(self) -> AutoSizes:
        """What ``auto`` means here. What must be known for it is measured and compared at the first call.

        Raises:
            EngineError: the engine failed.
        """
        if self._auto is None:
            self._auto = self._settle(BUDGET_SECONDS)
        return self._auto

    def compare_sizes(self) -> AutoSizes:
        """What ``auto`` means here once every size is compared, however long that takes.

        Raises:
            EngineError: the engine failed.
        """
        self._auto = self._settle(math.inf)
        return self._auto

    def _settle(self, budget: float) -> AutoSizes:
        trained = self._limits.trained_with
        first = min(trained.block_size, self._engine.max_block_size) if trained else 1
        return settle_sizes(
            self._engine,
            candidate_sizes(self._engine, first=first),
            first=first,
            pad_token_id=self._limits.pad_token_id,
            known_times=self._forward_seconds,
            known_sizes=self._exact_sizes,
            keep=self._know,
            budget=budget,
        )

    def _know(self, sizes: ExactSizes) -> None:
        self._exact_sizes = sizes
        self._keep_sizes(sizes)

    def _size_policy(self, block_size: BlockSize) -> SizePolicy:
        """The policy that gives n. All requests share one chooser."""
        return PinnedSize(block_size) if isinstance(block_size, int) else self.settle_auto().policy

    def _device_engine(self, request: ResolvedRequest) -> TrtEngine:
        from cllm_export.tensorrt.loop.device_request import require_device_loop

        assert isinstance(request.block_size, int), "n of such a request is a number"
        return require_device_loop(self._engine, block_size=request.block_size, num_eos=len(request.eos_token_ids))

    def _make_device_loop(self, request: ResolvedRequest, task: Task, forwards_per_sync: int) -> Loop:
        from cllm_export.tensorrt.loop.device_request import DeviceLoops, DeviceRequest

        assert isinstance(request.block_size, int), "n of such a request is a number"
        engine = self._device_engine(request)
        self._device_loops = self._device_loops or DeviceLoops()
        return DeviceRequest(
            self._device_loops.find(engine, block_size=request.block_size, forwards_per_sync=forwards_per_sync),
            task,
            num_slots=engine.num_slots,
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=request.eos_token_ids,
            proposed_token=None if request.proposer == "repeat" else self._limits.pad_token_id,
            memory=memory_of(engine, 0, self._prefix_cache),
        )
