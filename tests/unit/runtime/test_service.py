"""The service: many threads and event loops around one engine, over a fake one."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import EngineError, OptionError, PromptError, QueueFullError
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.request import RequestStatus
from cllm_export.runtime.options import GenerateOptions
from cllm_export.runtime.service import Service
from tests.fakes import HashModel, make_model, with_manifest, write_bundle

VOCABULARY = 200
PROMPTS = [[5], [6, 7, 8], list(range(2, 30)), [9] * 30, [3, 4], list(range(40, 57)), [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("service") / "bundle")


@pytest.fixture
def model(bundle):
    return make_model(bundle, HashModel(vocab_size=VOCABULARY, window=2), num_slots=3)


@pytest.fixture
def service(model):
    with Service(model, block_size=4) as service:
        yield service


def alone(bundle, prompt, **options):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY, window=2))
    return model.generate(prompt, block_size=4, **options)


def hold(model):
    """Make forwards wait until the event is set."""
    gate = threading.Event()
    forward = model.engine.forward

    def waiting(*arguments, **options):
        gate.wait(10)
        return forward(*arguments, **options)

    model.engine.forward = waiting
    return gate


def test_a_list_is_decoded_in_its_order_as_each_prompt_alone(service, bundle):
    generations = service.generate(PROMPTS, max_new_tokens=20)
    expected = [alone(bundle, prompt, max_new_tokens=20) for prompt in PROMPTS]
    assert [g.token_ids for g in generations] == [e.token_ids for e in expected]
    assert [g.text for g in generations] == [e.text for e in expected]
    assert [g.finish_reason for g in generations] == [e.finish_reason for e in expected]
    assert [g.forwards for g in generations] == [e.forwards for e in expected]


def test_deltas_add_up_to_the_text(service):
    handle = service.submit(PROMPTS[1], max_new_tokens=20)
    assert "".join(handle) == handle.result().text


def test_a_stop_string_ends_a_request_where_it_would_alone(service, bundle):
    text = alone(bundle, PROMPTS[1], max_new_tokens=20).text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    generation = service.submit(PROMPTS[1], max_new_tokens=20, stop=[stop]).result()
    expected = alone(bundle, PROMPTS[1], max_new_tokens=20, stop=[stop])
    assert (generation.text, generation.finish_reason) == (expected.text, "stop")
    assert generation.token_ids == expected.token_ids


def test_many_threads_may_submit_and_read(service, bundle):
    results = {}

    def work(index):
        prompt = PROMPTS[index % len(PROMPTS)]
        handle = service.submit(prompt, max_new_tokens=1 + index)
        results[index] = ("".join(handle), handle.result().token_ids)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for index, (text, tokens) in results.items():
        expected = alone(bundle, PROMPTS[index % len(PROMPTS)], max_new_tokens=1 + index)
        assert (text, tokens) == (expected.text, expected.token_ids)
    assert len(results) == 20


def test_event_loops_read_without_blocking(service, bundle):
    async def read(prompt):
        handle = service.submit(prompt, max_new_tokens=12)
        return "".join([delta async for delta in handle])

    async def main():
        return await asyncio.gather(*(read(prompt) for prompt in PROMPTS))

    texts = asyncio.run(main())
    assert texts == [alone(bundle, prompt, max_new_tokens=12).text for prompt in PROMPTS]


def test_a_slow_reader_holds_up_nobody(service):
    slow = service.submit(PROMPTS[0], max_new_tokens=30)
    iterator = iter(slow)
    next(iterator)
    others = service.generate([PROMPTS[1]] * 9, max_new_tokens=30)
    assert len(others) == 9
    assert slow.result(timeout=10).finish_reason in ("length", "eos")
    rest = "".join(iterator)
    assert slow.result().text.endswith(rest)


def test_a_full_queue_refuses_at_once(model):
    gate = hold(model)
    with Service(model, block_size=4, queue_size=2) as service:
        handles = [service.submit([5], max_new_tokens=4) for _ in range(5)]
        started = time.monotonic()
        with pytest.raises(QueueFullError, match="2 requests wait"):
            service.submit([5])
        assert time.monotonic() - started < 5
        gate.set()
        assert len([handle.result(10) for handle in handles]) == 5
        assert service.submit([5], max_new_tokens=4).result(10).token_ids == handles[0].result().token_ids


def test_generate_waits_for_room_in_the_queue(model):
    with Service(model, block_size=4, queue_size=1) as service:
        assert len(service.generate([[5]] * 30, max_new_tokens=3)) == 30


def test_a_cancelled_request_keeps_what_it_gave_and_frees_its_slot(model, bundle):
    with Service(model, block_size=4) as service:
        handle = service.submit([5, 6], max_new_tokens=40, ignore_eos=True)
        deltas = iter(handle)
        first = next(deltas)
        handle.cancel()
        generation = handle.result(10)
        assert first + "".join(deltas) == generation.text
        expected = alone(bundle, [5, 6], max_new_tokens=40, ignore_eos=True)
        assert generation.token_ids == expected.token_ids[: len(generation.token_ids)]
        handle.cancel()
        assert len(service.generate(PROMPTS, max_new_tokens=5)) == len(PROMPTS)


def test_an_engine_failure_reaches_its_requests_and_the_service_goes_on(model):
    forward, calls = model.engine.forward, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*arguments, **options)

    model.engine.forward = failing
    with Service(model, block_size=4) as service:
        handle = service.submit([5, 6], max_new_tokens=40, ignore_eos=True)
        with pytest.raises(EngineError, match="out of memory"):
            handle.result(10)
        with pytest.raises(EngineError, match="out of memory"):
            list(handle)
        assert service.submit([5, 6], max_new_tokens=4).result(10).token_ids


def test_bad_requests_are_refused_before_they_are_queued(service):
    with pytest.raises(PromptError, match="empty"):
        service.submit([])
    with pytest.raises(OptionError, match="max_new_tokens must be an integer of at least 1, got 0"):
        service.submit([5], max_new_tokens=0)
    with pytest.raises(OptionError, match="proposer must be one of"):
        service.submit([5], proposer="random")
    with pytest.raises(OptionError, match="block_size is the service's"):
        service.submit([5], block_size=2)
    with pytest.raises(PromptError, match="empty"):
        service.generate([[5], []])
    for prompts in ("the cat", b"the cat", 5, {"role": "user"}):
        with pytest.raises(PromptError, match="prompts must be a list of prompts, got "):
            service.generate(prompts)
    assert service.num_open == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("block_size", 2.5, "block_size must be an integer or 'auto', got 2.5"),
        ("queue_size", 0, "queue_size must be an integer of at least 1, got 0"),
        ("watch", 5, "watch must be a function of a StepReport, got 5"),
    ],
)
def test_a_bad_option_of_the_service_is_refused_and_leaves_the_model_free(model, option, value, said):
    with pytest.raises(OptionError, match=said):
        Service(model, **{option: value})
    assert model.generate([5], max_new_tokens=1)


def test_a_watcher_that_would_wait_for_itself_is_refused(bundle, tmp_path):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY), prefix_cache_bytes=1 << 20)
    refused = []

    def watch(_):
        waits = [
            lambda: handle.result(0.1),
            lambda: list(handle),
            service.warm_up,
            lambda: service.generate([[5]]),
            lambda: service.save_prefix(tmp_path / "prefix", [5]),
        ]
        for wait in waits if started.is_set() and not refused else ():
            try:
                wait()
            except EngineError as error:
                refused.append(str(error))

    started = threading.Event()
    with Service(model, block_size=4, watch=watch) as service:
        handle = service.submit([5], max_new_tokens=60, ignore_eos=True)
        started.set()
        assert handle.result(10).token_ids
        assert "".join(handle) == handle.result(10).text
    assert [text.split(" for ")[0] for text in refused] == ["a watcher must not wait"] * 5


def test_a_warm_up_needs_no_method_that_the_service_refuses(bundle):
    trained = TrainedWith(block_size=4, proposer="pad", loop="block")
    model = make_model(
        with_manifest(bundle, trained_with=trained), HashModel(vocab_size=VOCABULARY), forward_seconds={1: 1.0}
    )
    with Service(model, block_size="auto") as service:
        service.warm_up()


def test_closing_ends_what_runs_and_frees_the_model(model):
    gate = hold(model)
    service = Service(model, block_size=4)
    handles = [service.submit([5], max_new_tokens=50, ignore_eos=True) for _ in range(6)]
    closer = threading.Thread(target=service.close)
    closer.start()
    gate.set()
    closer.join(10)
    assert not closer.is_alive()
    assert all(handle.result(1).finish_reason == "cancelled" for handle in handles)
    with pytest.raises(EngineError, match="the service is closed"):
        service.submit([5])
    service.close()
    assert model.generate([5], max_new_tokens=3).token_ids


def test_a_model_in_a_service_is_in_use(service, model):
    with pytest.raises(EngineError, match="another request is running"):
        model.generate([5])
    with pytest.raises(EngineError, match="another request is running"):
        Service(model)


def test_a_result_can_be_waited_for_with_a_limit(model):
    gate = hold(model)
    with Service(model, block_size=4) as service:
        handle = service.submit([5], max_new_tokens=2)
        with pytest.raises(TimeoutError, match="so it was cancelled"):
            handle.result(0.01)
        assert not handle.done
        gate.set()
        assert handle.result(10).finish_reason == "cancelled"
        assert handle.done


def test_each_delta_is_handed_out_once(service):
    handle = service.submit([5], max_new_tokens=3)
    list(handle)
    with pytest.raises(OptionError, match="iterated already"):
        list(handle)


def test_a_watcher_sees_every_forward_and_its_failure_harms_nobody(model):
    reports = []

    def watch(report):
        reports.append(report)
        if len(reports) == 3:
            raise ValueError("a bug in the watcher")

    with Service(model, block_size=4, watch=watch) as service:
        service.warm_up()
        assert reports[0].width == 4
        assert service.submit([5], max_new_tokens=30, ignore_eos=True).result(10).token_ids
    assert len(reports) == 3


def test_a_service_that_chooses_n_gives_every_request_its_own_tokens(model, bundle):
    methods = ["jacobi", "autoregressive", "jacobi", "jacobi", "autoregressive", "jacobi", "jacobi"]
    with Service(model, block_size="auto") as service:
        handles = [
            service.submit(prompt, method=method, max_new_tokens=20)
            for prompt, method in zip(PROMPTS, methods, strict=True)
        ]
        found = [handle.result(timeout=30).token_ids for handle in handles]
        with pytest.raises(OptionError, match="deterministic is the service's"):
            service.submit([5], deterministic=True)
        with pytest.raises(OptionError, match="a block of jacobi-block keeps its size"):
            service.submit([5], method="jacobi-block")
    assert found == [alone(bundle, prompt, max_new_tokens=20).token_ids for prompt in PROMPTS]


def test_a_service_that_cannot_measure_its_engine_leaves_the_model_free(bundle):
    model = make_model(bundle, HashModel(vocab_size=VOCABULARY), exact_sizes=ExactSizes())
    model.engine.forward = None
    with pytest.raises(TypeError):
        Service(model, block_size="auto")
    with model.lease.hold():
        pass


def test_a_handle_tells_where_its_request_is(model):
    gate = hold(model)
    with Service(model, block_size=4) as service:
        handles = [service.submit([5], max_new_tokens=40, ignore_eos=True) for _ in range(4)]
        assert handles[3].status is RequestStatus.WAITING
        handles[3].cancel()
        gate.set()
        assert [handle.result(10).finish_reason for handle in handles] == ["length"] * 3 + ["cancelled"]
        assert [handle.status for handle in handles] == [RequestStatus.FINISHED] * 3 + [RequestStatus.CANCELLED]


def test_options_are_given_whole_or_by_name(service):
    options = GenerateOptions(max_new_tokens=5, ignore_eos=True)
    whole, by_name = (
        service.generate(PROMPTS, options),
        service.generate(PROMPTS, max_new_tokens=5, ignore_eos=True),
    )
    assert [found.token_ids for found in whole] == [found.token_ids for found in by_name]
    assert len(service.submit([5], options, max_new_tokens=3).result().token_ids) == 3


def test_a_service_of_something_else_than_a_model_is_refused():
    with pytest.raises(OptionError, match="model must be a Model, got str: load a bundle first"):
        Service("my-bundle")
