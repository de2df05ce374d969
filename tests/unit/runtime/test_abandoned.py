"""A request that nobody waits for gives its slot and its place in the queue back: it was dropped, left or overdue."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.request import RequestStatus
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import RequestMaker, RequestRun
from cllm_export.runtime.service import Handle, Service
from tests.fakes import HashModel, calls_of, make_model, write_bundle

LONG: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "method": "autoregressive"}
"""Options of a request that ends after 40 forwards of its own, unless something ends it earlier."""


class Watched:
    """A model with one slot. Its runs are kept, its clock is set by hand, and its second decode forward waits."""

    def __init__(self, path: Path) -> None:
        self.model = make_model(write_bundle(path), HashModel(vocab_size=200, window=2))
        self.now = 0.0
        self.runs: list[RequestRun] = []
        self.gate = threading.Event()
        """Lets the second forward and all later ones run."""
        requests = RequestMaker(self.model.limits, self.model.codec, self.model.pool, clock=lambda: self.now)
        make, forward, forwards = requests.make, self.model.engine.forward, []

        def keep(*arguments: Any, **options: Any) -> RequestRun:
            self.runs.append(make(*arguments, **options))
            return self.runs[-1]

        def wait(*arguments: Any, **options: Any) -> Any:
            if forwards:
                self.gate.wait(10)
            forwards.append(1)
            return forward(*arguments, **options)

        requests.make = keep  # type: ignore[method-assign]
        self.model.requests = requests
        self.model.engine.forward = wait  # type: ignore[method-assign]

    def reason(self, index: int) -> str | None:
        """Why a request ended, once it has."""
        self.gate.set()
        run = self.runs[index]
        with run.changed:
            assert run.changed.wait_for(lambda: run.status.has_ended, 10)
        return run.task.decode.finish_reason


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "bundle")


def leave_a_loop(handle: Handle) -> None:
    for _ in handle:
        break


def give_up_waiting(handle: Handle) -> None:
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)


def leave_an_async_loop(handle: Handle) -> None:
    async def read() -> None:
        async for _ in handle:
            break

    asyncio.run(read())


def cancel_a_reading_task(handle: Handle) -> None:
    async def main() -> None:
        read = asyncio.Event()

        async def reading() -> None:
            async for _ in handle:
                read.set()

        task = asyncio.create_task(reading())
        await read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def cancel_a_waiting_task(handle: Handle) -> None:
    async def main() -> None:
        task = asyncio.create_task(handle.wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


@pytest.mark.parametrize(
    "leave", [leave_a_loop, give_up_waiting, leave_an_async_loop, cancel_a_reading_task, cancel_a_waiting_task]
)
def test_a_reader_that_leaves_early_gives_the_slot_back(watched: Watched, leave: Callable[[Handle], None]):
    """The handle itself is still there, and tells what there was until then."""
    with Service(watched.model, block_size=4) as service:
        handle = service.submit([5, 6], **LONG)
        leave(handle)
        assert watched.reason(0) == "cancelled"
        assert handle.status is RequestStatus.CANCELLED
        assert len(handle.result().token_ids) < LONG["max_new_tokens"]
        assert service.submit([5], max_new_tokens=3, ignore_eos=True).result(10).finish_reason == "length"


def test_a_dropped_handle_gives_the_slot_back(watched: Watched):
    with Service(watched.model, block_size=4) as service:
        service.submit([5, 6], **LONG)
        assert watched.reason(0) == "cancelled"


def test_a_handle_that_waited_in_a_cycle_gives_the_slot_back_when_it_is_collected(watched: Watched):
    """The collection runs in a thread that holds the service's lock, which cancelling must not need."""
    with Service(watched.model, block_size=4) as service:
        handle = service.submit([5, 6], **LONG)
        handle.itself = handle  # type: ignore[attr-defined]
        del handle
        with service._work:
            gc.collect()
        assert watched.reason(0) == "cancelled"


def test_a_dropped_handle_gives_its_place_in_the_queue_back(watched: Watched):
    with Service(watched.model, block_size=4, queue_size=1) as service:
        running, waiting = service.submit([5, 6], **LONG), service.submit([7, 8], **LONG)
        del waiting
        assert watched.reason(1) == "cancelled"
        assert watched.runs[1].task.decode.records == []
        assert running.result(10).finish_reason == "length"


def test_an_error_in_a_list_gives_the_other_slots_back(watched: Watched):
    """The first prompt fails, and nobody would read the others."""
    prefill = watched.model.engine.prefill

    def fail_once(batch: Any) -> None:
        watched.model.engine.prefill = prefill  # type: ignore[method-assign]
        raise EngineError("out of memory")

    watched.model.engine.prefill = fail_once  # type: ignore[method-assign]
    with Service(watched.model, block_size=4) as service:
        with pytest.raises(EngineError, match="out of memory"):
            service.generate([[5, 6], [7, 8], [9, 9]], **LONG)
        assert [watched.reason(1), watched.reason(2)] == ["cancelled", "cancelled"]


def test_a_stream_that_a_loop_left_lends_the_model_at_once(watched: Watched):
    """Its variable may live on."""
    watched.gate.set()
    stream = watched.model.stream([5, 6], **LONG)
    for _ in stream:
        break
    assert watched.model.generate([5, 6], max_new_tokens=3, ignore_eos=True).finish_reason == "length"
    assert stream.result().finish_reason == "cancelled"


def test_a_dropped_stream_lends_the_model_at_once(watched: Watched):
    watched.gate.set()
    stream = watched.model.stream([5, 6], **LONG)
    next(stream)
    del stream
    assert watched.model.generate([5, 6], max_new_tokens=3, ignore_eos=True).finish_reason == "length"


def test_an_event_loop_waits_for_a_whole_result(watched: Watched):
    watched.gate.set()

    async def main() -> list[str]:
        async with Service(watched.model, block_size=4) as service:
            handles = [service.submit([5, 6], **LONG) for _ in range(3)]
            generations = await asyncio.gather(*(handle.wait() for handle in handles))
            assert [await handle.wait() for handle in handles] == generations
            with pytest.raises(EngineError, match="another request is running"):
                watched.model.generate([5])
        return [generation.text for generation in generations]

    assert asyncio.run(main()) == [watched.model.generate([5, 6], block_size=4, **LONG).text] * 3


def test_a_deadline_ends_a_request_with_what_it_has(watched: Watched):
    with Service(watched.model, block_size=4) as service:
        handle = service.submit([5, 6], deadline=2.5, **LONG)
        next(deltas := iter(handle))
        watched.now = 2.5
        assert watched.reason(0) == "deadline"
        generation = handle.result()
        assert 0 < len(generation.token_ids) < LONG["max_new_tokens"]
        assert generation.finish_reason == "deadline"
        assert handle.status is RequestStatus.CANCELLED
        list(deltas)
        assert service.num_open == 0


def test_a_deadline_counts_in_the_queue(watched: Watched):
    with Service(watched.model, block_size=4) as service:
        running, waiting = service.submit([5, 6], **LONG), service.submit([7, 8], deadline=1, **LONG)
        watched.now = 1
        assert watched.reason(1) == "deadline"
        assert (waiting.result().token_ids, waiting.result().text) == ((), "")
        assert running.result(10).finish_reason == "length"


def test_a_deadline_that_is_kept_changes_nothing(watched: Watched):
    watched.gate.set()
    free = watched.model.generate([5, 6], block_size=4, **LONG)
    assert watched.model.generate([5, 6], block_size=4, deadline=1, **LONG).token_ids == free.token_ids
    with Service(watched.model, block_size=4) as service:
        assert service.submit([5, 6], deadline=1, **LONG).result(10).token_ids == free.token_ids


def test_a_deadline_ends_a_request_without_a_service(watched: Watched):
    """It counts from the first forward, not from the call that makes the stream."""
    watched.gate.set()
    stream = watched.model.stream([5, 6], deadline=3, **LONG)
    watched.now = 100
    first = next(stream)
    watched.now = 103
    generation = stream.result()
    assert (generation.text, generation.finish_reason) == (first, "deadline")
    assert watched.model.generate([5, 6], max_new_tokens=3, ignore_eos=True).finish_reason == "length"


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_deadline_is_a_positive_number(watched: Watched, deadline: Any):
    with pytest.raises(OptionError, match="deadline must be a number above 0, got"):
        watched.model.generate([5], deadline=deadline)


def in_a_fork(work: Callable[[], str]) -> str:
    """What ``work`` returns in a forked process, which is stopped if it hangs."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            signal.alarm(30)
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def refusal(use: Callable[[], object]) -> str:
    try:
        return repr(use())
    except EngineError as error:
        return str(error)


def test_a_forked_service_refuses_every_call_and_says_what_to_do(watched: Watched):
    """The lock is held at the fork, as the worker may hold it at any time."""
    with Service(watched.model, block_size=4) as service:
        handle = service.submit([5, 6], **LONG)
        uses: list[Callable[[], object]] = [
            lambda: service.submit([5]),
            lambda: service.generate([[5]]),
            service.warm_up,
            handle.result,
            lambda: list(handle),
            lambda: asyncio.run(handle.wait()),
        ]
        for use in uses:
            with service._work:
                said = in_a_fork(lambda use=use: refusal(use))  # type: ignore[misc]
            assert said.startswith("this service was made before the process was forked")
            assert said.endswith("make the Service after the fork")
        with service._work:
            assert in_a_fork(lambda: refusal(service.close)) == "None"
            assert "in use when the process was forked" in in_a_fork(
                lambda: refusal(lambda: watched.model.generate([5]))
            )
        watched.gate.set()
        assert handle.result(10).finish_reason == "length"


def test_a_service_that_is_made_after_the_fork_answers(watched: Watched):
    watched.gate.set()

    def serve() -> str:
        with Service(watched.model, block_size=4) as service:
            return service.generate([[5, 6]], **LONG)[0].finish_reason

    assert in_a_fork(serve) == "length"
    assert calls_of(watched.model) == []


def test_a_model_is_free_after_its_services_requests_were_given_up(watched: Watched):
    model: Model = watched.model
    with Service(model, block_size=4) as service:
        leave_a_loop(service.submit([5, 6], **LONG))
        watched.gate.set()
    assert model.generate([5, 6], max_new_tokens=3, ignore_eos=True).finish_reason == "length"
