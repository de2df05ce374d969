"""A service around one engine: requests from any thread or event loop, decoded together in the engine's slots.

One worker thread owns scheduler and engine; callers share nothing with it but a queue, and what each handle has been
given. Readers never hold up decoding: a request's tokens wait in its handle, which its own length limit bounds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, OptionError, PromptError, QueueFullError
from cllm_export.runtime.decoding.batch import MIN_READING_WIDTH
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target, write_snapshot
from cllm_export.runtime.decoding.request import StopCut, require_shareable
from cllm_export.runtime.decoding.scheduler import Scheduler, StepReport
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.decoding.text import Messages, TextStream
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import READING, BlockSize, Options, Prepared, pad_token
from cllm_export.runtime.request_run import Generation

log = logging.getLogger(__name__)

DEFAULT_QUEUE_SIZE = 256
T = TypeVar("T")
Watcher = Callable[[StepReport], None]


class Handle:
    """One submitted request. Iterate it (or ``async for``) for text deltas, or take the whole ``result``.

    Reading ends with the request, a cancelled one's too, and raises what made it fail.
    Safe from any thread; but one reader at a time, since each delta is handed out once.
    """

    def __init__(self, service: Service, prepared: Prepared, eos: frozenset[int]) -> None:
        self._service = service
        self._prepared = prepared
        self._eos = eos
        self._changed = threading.Condition()
        self._new: deque[int] = deque()
        self._stream = TextStream(service.codec, prepared.stop)
        self._is_read = False
        self._wakers: list[Callable[[], None]] = []
        self._is_done = False
        watch = TextStream(service.codec, prepared.stop) if prepared.stop else None
        decode = service.model.make_decode(prepared, _stop_cut(watch, eos) if watch else None)
        self._task = Task(
            prepared.prompt, decode, drafts=service.model.drafts_of(prepared), take=self._take, ended=self._end
        )

    @property
    def done(self) -> bool:
        """Whether it has ended, however it ended."""
        return self._is_done

    def cancel(self) -> None:
        """Stop it; its slot is free for the next forward. What it has given so far stays. Nothing if it has ended."""
        self._service._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end and give the whole; ``finish_reason`` is ``closed`` where it was cancelled.

        Raises:
            TimeoutError: it has not ended within ``timeout`` seconds; it goes on.
            CllmExportError: what it failed with, EngineError where the engine did; or a watcher asks before its end.
        """
        self._require_reader()
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds; it goes on")
        self._raise_failure()
        return self._generation()

    def __iter__(self) -> Iterator[str]:
        self._start_reading()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._is_done)
                tokens, ended = self._drain()
            if delta := self._push(tokens, ended):
                yield delta
            if ended:
                self._raise_failure()
                return

    async def __aiter__(self) -> AsyncIterator[str]:
        self._start_reading()
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed, with a reader still in it
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                with self._changed:
                    ready = bool(self._new) or self._is_done
                    if not ready:
                        event.clear()
                    tokens, ended = self._drain()
                if not ready:
                    await event.wait()
                    continue
                if delta := self._push(tokens, ended):
                    yield delta
                if ended:
                    self._raise_failure()
                    return
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def _raise_failure(self) -> None:
        if self._task.error:
            raise self._task.error

    def _require_reader(self) -> None:
        if not self._is_done:
            self._service._require_caller()

    def _start_reading(self) -> None:
        self._require_reader()
        with self._changed:
            if self._is_read:
                raise OptionError("this handle has been iterated already: each delta is handed out once; use result()")
            self._is_read = True

    def _drain(self) -> tuple[list[int], bool]:
        tokens = list(self._new)
        self._new.clear()
        return tokens, self._is_done

    def _push(self, tokens: list[int], ended: bool) -> str:
        delta = self._stream.push([token for token in tokens if token not in self._eos])
        return delta + self._stream.flush() if ended else delta

    def _take(self, tokens: list[int]) -> None:
        with self._changed:
            self._new.extend(tokens)
            self._notify()

    def _end(self, _: Task) -> None:
        self._service._has_ended()
        with self._changed:
            self._is_done = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            wake()

    def _generation(self) -> Generation:
        task = self._task
        token_ids = tuple(token for record in task.decode.records for token in record.new)
        stream = TextStream(self._service.codec, self._prepared.stop)
        stream.push([token for token in token_ids if token not in self._eos])
        stream.flush()
        return Generation(
            text=stream.text,
            token_ids=token_ids,
            finish_reason=task.decode.finish,
            seed=self._prepared.sampling.seed,
            logprobs=None if self._prepared.logprobs is None else tuple(task.decode.logprobs),
            forwards=tuple(task.decode.records),
            statistics=task.statistics(),
        )


class Service:
    """Decodes many requests at once on a loaded model, each as it would decode alone.

    With one n for all forwards, as by default, a request gives bit for bit what it gives alone in this service,
    whatever else is running. With ``auto`` n is chosen for the batch, forward by forward, to make most tokens a second:
    a request then gives the same tokens, but where rounding turns a near tie on a processor where this was not checked.
    Use it in a ``with``, or ``close`` it. While it is open, ``Model.generate`` is refused.

    Args:
        model: loaded with as many slots as requests should run at once (``load(path, num_slots=8)``).
        block_size: n of every forward, by default the model's; or ``auto``.
        queue_size: requests that may wait for a slot.
        watch: called after each forward, in the worker thread, for metrics; must be quick and not raise.

    Raises:
        OptionError: an option is out of range for the model.
        EngineError: the model is in use.
    """

    def __init__(
        self,
        model: Model,
        *,
        block_size: BlockSize | None = None,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        watch: Watcher | None = None,
    ) -> None:
        require_at_least("queue_size", queue_size, 1)
        if watch is not None and not callable(watch):
            raise OptionError(f"watch must be a function of a StepReport, got {watch!r}")
        self.model = model
        self.codec = model.codec
        self.pad_token_id = pad_token(model.facts)
        self.block_size = model.settle_block_size(block_size, deterministic=block_size is None)
        self._queue_size = queue_size
        self._watch = watch
        self._inbox: deque[Handle] = deque()
        self._cancelled: deque[Handle] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        lock = threading.Lock()
        self._work, self._room = threading.Condition(lock), threading.Condition(lock)
        self._num_open = 0
        self._capacity = model.engine.num_slots + queue_size
        self._is_closed = False
        with ExitStack() as stack:
            stack.enter_context(model.in_use())
            self._scheduler = self._make_scheduler()
            self._closing = stack.pop_all()
        self._worker = threading.Thread(target=self._run, name="cllm-export service", daemon=True)
        self._worker.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    @property
    def num_open(self) -> int:
        """Requests that were submitted and have not ended."""
        return self._num_open

    def submit(self, prompt: str | Sequence[int] | Messages, **options: Unpack[Options]) -> Handle:
        """Queue a request and return at once. ``options`` are ``Options`` less ``block_size``, the service's.

        Safe from any thread.

        Raises:
            PromptError, OptionError: the request is refused before it is queued.
            QueueFullError: as many requests wait as may.
            EngineError: the service is closed.
        """
        handle = self._make_handle(prompt, options)
        with self._work:
            self._require_open()
            if self._num_open >= self._capacity:
                raise QueueFullError(self._queue_size)
            self._put(handle)
        return handle

    def generate(
        self, prompts: Sequence[str | Sequence[int] | Messages], **options: Unpack[Options]
    ) -> list[Generation]:
        """Decode prompts together and wait for all; results in their order. Where the queue is full it waits for room.

        Raises:
            PromptError, OptionError: a request is refused; none has been queued then.
            EngineError: the engine failed, or the service is closed; or a watcher calls.
        """
        self._require_caller()
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise PromptError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        handles = [self._make_handle(prompt, options) for prompt in prompts]
        for handle in handles:
            with self._work:
                self._room.wait_for(lambda: self._num_open < self._capacity or self._is_closed)
                self._require_open()
                self._put(handle)
        return [handle.result() for handle in handles]

    def warm_up(self) -> None:
        """Run a forward of the service's shape, so that the first request does not pay for what engines do once.

        Raises:
            EngineError: the engine failed.
        """
        self._require_caller()
        self.submit([self.pad_token_id], method="jacobi", max_new_tokens=1, ignore_eos=True).result()

    def save_prefix(self, path: str | Path, prompt: str | Sequence[int] | Messages) -> int:
        """Like ``Model.save_prefix``, beside whatever is running: the prompt is read as a request.

        Safe from any thread but the worker's, which a watcher runs in.

        Raises:
            PromptError, OptionError, OutputError: as there.
            QueueFullError: as many requests wait as may.
            EngineError: the engine failed, or the service is closed.
        """
        self._require_caller()
        state = self.model.require_prompt_state()
        check_target(path)
        tokens = self.model.encode(prompt)
        self.submit(tokens, **READING).result()
        write_snapshot(path, self._call(lambda: state.snapshot(tokens)))
        return len(tokens)

    def load_prefix(self, path: str | Path) -> int:
        """Like ``Model.load_prefix``, between two forwards of whatever is running.

        Safe from any thread but the worker's, which a watcher runs in.

        Raises:
            SnapshotError, OptionError: as there.
            EngineError: the service is closed.
        """
        state = self.model.require_prompt_state()
        snapshot = state.read(path)
        self._call(lambda: state.keep(snapshot))
        return len(snapshot.tokens)

    def close(self) -> None:
        """Cancel what runs and waits, stop the worker, and free the model. Safe to call again."""
        with self._work:
            self._is_closed = True
            self._work.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
            self._closing.close()

    def _make_scheduler(self) -> Scheduler:
        """One n reads prompts in chunks of it, but a small one in turn with wider forwards; a chosen one, which may be
        1, in chunks of some more."""
        wide = min(MIN_READING_WIDTH, self.model.engine.geometry.max_block_size)
        is_small = self.block_size != "auto" and self.block_size <= wide // 2
        return Scheduler(
            self.model.engine,
            block_size=self.model.size_policy(self.block_size),
            pad_token_id=self.pad_token_id,
            drafter=self.model.draft_model,
            prefix_cache=self.model.prefix_cache,
            reading_width=wide if self.block_size == "auto" else None,
            turn_width=wide if is_small else None,
        )

    def _make_handle(self, prompt: str | Sequence[int] | Messages, options: Options) -> Handle:
        for name in ("block_size", "deterministic"):
            if name in options:
                raise OptionError(f"{name} is the service's, one for all its requests: Service(model, block_size=...)")
        require_shareable(options.get("method"), options.get("forwards_per_sync"))
        prepared = self.model.prepare(prompt, **(options | Options(block_size=self.block_size)))
        return Handle(self, prepared, self.model.eos_of(prepared))

    def _put(self, handle: Handle) -> None:
        self._inbox.append(handle)
        self._num_open += 1
        self._work.notify_all()

    def _call(self, function: Callable[[], T]) -> T:
        """What a function gives that the worker runs between two forwards."""
        self._require_caller()
        future: Future[T] = Future()
        with self._work:
            self._require_open()
            self._calls.append((function, future))
            self._work.notify_all()
        return future.result()

    def _require_caller(self) -> None:
        """Refuse to wait in the worker, which would be for itself and for ever."""
        if threading.current_thread() is self._worker:
            raise EngineError("a watcher must not wait for the service whose worker it runs in: ask in another thread")

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the service is closed")

    def _cancel(self, handle: Handle) -> None:
        with self._work:
            self._cancelled.append(handle)
            self._work.notify_all()

    def _has_ended(self) -> None:
        with self._work:
            self._num_open -= 1
            self._room.notify_all()

    def _run(self) -> None:
        """The worker: everything that touches scheduler and engine."""
        while self._collect():
            report = self._scheduler.step()
            if report and self._watch:
                self._tell(report)

    def _tell(self, report: StepReport) -> None:
        try:
            if self._watch:
                self._watch(report)
        except Exception:
            log.exception("the service's watcher failed, and is not called again")
            self._watch = None

    def _collect(self) -> bool:
        """Wait for work and take it in; False once the service is closed."""
        with self._work:
            self._work.wait_for(
                lambda: self._is_closed or self._inbox or self._cancelled or self._calls or not self._scheduler.is_idle
            )
            arrived, cancelled, calls = list(self._inbox), list(self._cancelled), list(self._calls)
            for queue in (self._inbox, self._cancelled, self._calls):
                queue.clear()
            is_closed = self._is_closed
        for handle in arrived:
            self._scheduler.submit(handle._task)
        for handle in cancelled:
            self._scheduler.cancel(handle._task)
        for function, future in calls:
            _run_call(function, future)
        if is_closed:
            self._scheduler.cancel_all()
        return not is_closed


def _run_call(function: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # it is the caller's, in whose thread it is raised
        future.set_exception(error)


def _stop_cut(watch: TextStream, eos: frozenset[int]) -> StopCut:
    """Where a stop string ends the request among new tokens; reads them one by one."""

    def cut(new: list[int]) -> int | None:
        for index, token in enumerate(new):
            watch.push([] if token in eos else [token])
            if watch.stopped:
                return index + 1
        return None

    return cut
