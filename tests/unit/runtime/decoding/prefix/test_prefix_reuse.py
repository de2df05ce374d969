"""Prefix reuse through the scheduler, the model and the service: nothing is read twice, and no token changes."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import EngineError, OptionError, OutputError, SnapshotError
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.request import METHODS, Decode, make_decoder
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.service import Service
from tests.fakes import EOS, PAD, FakeEngine, HashModel, calls_of, greedy, make_geometry, make_model, properties
from tests.fakes import write_bundle as write_fake_bundle

VOCABULARY = 9
PLENTY = 1 << 24
ROW_BYTES = 4 * 2 * 8 * 8
"""Of a row of the fake engine."""


def language_model():
    return HashModel(vocab_size=VOCABULARY, seed=3)


def make_engine(num_slots=1, kind=FakeEngine):
    return kind(language_model(), make_geometry(vocab_size=VOCABULARY, max_length=120), num_slots=num_slots)


def make_task(prompt, *, count=8, method="jacobi", eos=(), stop_cut=None, **callbacks):
    decoder = make_decoder(method, prompt, proposer="pad", seed=0, pad_token_id=PAD)
    return Task(prompt, Decode(decoder, max_new_tokens=count, eos_token_ids=eos, stop_cut=stop_cut), **callbacks)


def text_of(task):
    return [token for record in task.decode.records for token in record.new]


def run(engine, cache, task, *, block_size=4, cancel_after=None):
    """Run a task alone; the prompt's tokens that were read."""
    scheduler = Scheduler(engine, block_size=block_size, pad_token_id=PAD, prefix_cache=cache)
    scheduler.submit(task)
    read, steps = 0, 0
    while not scheduler.is_idle:
        if steps == cancel_after:
            scheduler.cancel(task)
            break
        before = len(engine.calls)
        report = scheduler.step()
        steps += 1
        if report and report.num_prefilling:
            read += sum(engine.calls[before].num_committed)
    return read


prompts = st.tuples(st.integers(0, 40), st.lists(st.integers(0, 2), max_size=30)).map(
    lambda pair: [5, *([7] * pair[0]), *pair[1]]
)


@properties
@given(
    data=st.lists(
        st.tuples(
            prompts,
            st.integers(1, 20),
            st.sampled_from(METHODS),
            st.integers(0, 6),
            st.sampled_from([None, None, 0, 1, 3, 7]),
        ),
        min_size=1,
        max_size=8,
    ),
    num_slots=st.integers(1, 3),
    block_size=st.integers(1, 8),
    prefill_width=st.sampled_from([None, 3, 16]),
    num_rows=st.sampled_from([20, 60, 10_000]),
)
def test_whatever_is_reused_evicted_and_cancelled_a_task_gives_the_models_own_tokens(
    data, num_slots, block_size, prefill_width, num_rows
):
    """Every row counts: a row from the wrong text, place or moment gives other tokens."""
    cache = PrefixCache(num_rows * ROW_BYTES)
    scheduler = Scheduler(
        make_engine(num_slots),
        block_size=block_size,
        pad_token_id=PAD,
        prefill_width=prefill_width,
        prefix_cache=cache,
    )
    tasks = [make_task(prompt, count=count, method=method, eos=(EOS,)) for prompt, count, method, _, _ in data]
    step = 0
    while step <= 6 or not scheduler.is_idle:
        for task, (_, _, _, arrival, cancelled) in zip(tasks, data, strict=True):
            if arrival == step:
                scheduler.submit(task)
            if cancelled is not None and arrival + cancelled == step:
                scheduler.cancel(task)
        scheduler.step()
        step += 1
    again = [make_task([*task.prompt, *text_of(task), 4], count=6) for task in tasks]
    for task in again:
        scheduler.submit(task)
    while not scheduler.is_idle:
        scheduler.step()
    for task in tasks + again:
        expected = greedy(language_model(), task.prompt, 20)
        found = text_of(task)
        assert task.error is None
        assert found == expected[: len(found)]
    assert all(len(text_of(task)) == 6 for task in again)


def test_a_prompt_that_comes_again_is_not_read_again():
    engine, cache = make_engine(), PrefixCache(PLENTY)
    prompt = list(range(9)) * 5
    first, second = make_task(prompt), make_task(prompt)
    assert run(engine, cache, first) == 44
    assert run(engine, cache, second) == 0
    assert second.reused_tokens == second.statistics().reused_tokens == 44
    assert second.statistics().to_dict()["reused_tokens"] == 44
    assert text_of(first) == text_of(second)


def test_without_a_cache_every_prompt_is_read():
    engine = make_engine()
    prompt = list(range(9)) * 5
    assert [run(engine, None, make_task(prompt)) for _ in range(2)] == [44, 44]


def test_the_last_token_of_a_prompt_is_left_to_the_block():
    engine, cache = make_engine(), PrefixCache(PLENTY)
    run(engine, cache, make_task([5, 6, 7, 8, 2, 3]))
    task = make_task([5, 6, 7, 8])
    assert run(engine, cache, task) == 0
    assert task.reused_tokens == 3
    assert text_of(task) == greedy(language_model(), task.prompt, 8)


def test_a_step_reports_what_it_need_not_read():
    engine, cache = make_engine(), PrefixCache(PLENTY)
    run(engine, cache, make_task([5, 6, 7, 8]))
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD, prefix_cache=cache)
    scheduler.submit(make_task([5, 6, 7, 2, 3]))
    assert [scheduler.step().reused_tokens, scheduler.step().reused_tokens] == [3, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["length", "eos", "stop", "cancel"])
def test_the_next_turn_reads_only_what_is_new_however_the_last_one_ended(method, end):
    """Of the answer its last token has no KV where it is the bonus of the last forward, as one that a length ends."""
    engine, cache = make_engine(), PrefixCache(PLENTY)
    prompt = list(range(2, 9)) * 3
    answer = greedy(language_model(), prompt, 30)
    task = make_task(
        prompt,
        count=11 if end == "length" else 30,
        method=method,
        eos=(answer[9],) if end == "eos" else (),
        stop_cut=(lambda new: stop_at(task, new, 8)) if end == "stop" else None,
    )
    run(engine, cache, task, cancel_after=9 if end == "cancel" else None)
    said = text_of(task)
    assert said == answer[: len(said)]
    assert said
    assert task.decode.finish_reason == ("cancelled" if end == "cancel" else end)
    following = make_task([*prompt, *said, 4, 4, 4, 4])
    read = run(engine, cache, following)
    assert read in (3, 4), "the new tokens less the last, and the answer's last one"
    assert text_of(following) == greedy(language_model(), following.prompt, 8)


def stop_at(task, new, count):
    left = count - len(text_of(task))
    return left if left <= len(new) else None


def test_a_prompt_cancelled_while_it_is_read_is_kept_as_far_as_it_was_read():
    engine, cache = make_engine(), PrefixCache(PLENTY)
    prompt = list(range(9)) * 5
    run(engine, cache, make_task(prompt), cancel_after=3)
    task = make_task(prompt)
    assert run(engine, cache, task) == 44 - 12
    assert text_of(task) == greedy(language_model(), prompt, 8)


def test_a_prompt_serves_others_while_its_own_request_still_decodes():
    engine, cache = make_engine(2), PrefixCache(PLENTY)
    scheduler = Scheduler(engine, block_size=4, pad_token_id=PAD, prefix_cache=cache)
    first, second = make_task([5] * 20, count=60, method="autoregressive"), make_task([5] * 20)
    scheduler.submit(first)
    while not first.decode.is_finished and not first.decode.records:
        scheduler.step()
    scheduler.submit(second)
    scheduler.step()
    assert second.reused_tokens == 19
    assert first.decode.finish_reason is None


class Flaky(FakeEngine):
    """Fails where it is told to, once."""

    fails: str | None = None

    def forward(self, *arguments, **options):
        self._fail("forward")
        return super().forward(*arguments, **options)

    def read_rows(self, slot, start, stop):
        self._fail("read")
        return super().read_rows(slot, start, stop)

    def write_rows(self, slot, start, stop, rows):
        self._fail("write")
        super().write_rows(slot, start, stop, rows)

    def _fail(self, kind):
        if self.fails == kind:
            self.fails = None
            raise RuntimeError(f"no {kind}")


@pytest.mark.parametrize("kind", ["forward", "read", "write"])
def test_an_engine_that_fails_leaves_whole_entries_and_ends_its_task_with_an_error(kind):
    engine, cache = make_engine(kind=Flaky), PrefixCache(PLENTY)
    head = [5] * 20
    run(engine, cache, make_task(head))
    held = cache.statistics.tokens
    engine.fails = kind
    task = make_task([*head, 6, 6, 6, 6, 6, 6])
    run(engine, cache, task)
    assert isinstance(task.error, EngineError)
    assert f"no {kind}" in str(task.error)
    kept = 9 if kind == "forward" else 0  # the prompt's rest was read before that; it parts within a chunk of 4 tokens
    assert cache.statistics.tokens == held + kept
    again = make_task(task.prompt)
    run(engine, cache, again)
    assert text_of(again) == greedy(language_model(), again.prompt, 8)


def test_rows_that_cannot_be_read_at_the_end_are_the_tasks_error_and_free_the_slot():
    engine, cache = make_engine(kind=Flaky), PrefixCache(PLENTY)
    task = make_task([5], count=3, take=lambda _: setattr(engine, "fails", "read"))
    run(engine, cache, task)
    assert isinstance(task.error, EngineError)
    assert len(text_of(task)) == 3
    assert cache.statistics.tokens == 0


def test_what_a_taker_raises_keeps_the_rows_that_were_right():
    def refuse(tokens):
        raise ValueError("no")

    engine, cache = make_engine(), PrefixCache(PLENTY)
    task = make_task([5, 6, 7], take=refuse)
    run(engine, cache, task)
    assert isinstance(task.error, ValueError)
    following = make_task([5, 6, 7, *text_of(task), 4])
    assert run(engine, cache, following) <= 1
    assert text_of(following) == greedy(language_model(), following.prompt, 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_fake_bundle(tmp_path_factory.mktemp("reuse") / "bundle")


def new_model(bundle, *, prefix_cache_bytes=PLENTY, num_slots=1):
    return make_model(
        bundle, HashModel(vocab_size=200, seed=1), num_slots=num_slots, prefix_cache_bytes=prefix_cache_bytes
    )


PROMPT = list(range(20, 50))


def test_a_stream_that_is_closed_early_keeps_what_it_gave(bundle):
    model = new_model(bundle)
    with model.stream(PROMPT, max_new_tokens=20, ignore_eos=True) as stream:
        next(stream)
    said = stream.result().token_ids
    following = model.generate([*PROMPT, *said, 7], max_new_tokens=4)
    assert following.statistics.reused_tokens >= len(PROMPT) + len(said) - 1


def test_a_model_without_a_cache_says_so(bundle, tmp_path):
    model = new_model(bundle, prefix_cache_bytes=0)
    assert model.prefix_cache is None
    assert model.generate(PROMPT, max_new_tokens=2).statistics.reused_tokens == 0
    with pytest.raises(OptionError, match="keeps no prompts"):
        model.save_prefix(tmp_path / "prefix", PROMPT)
    with pytest.raises(OptionError, match="keeps no prompts"):
        model.load_prefix(tmp_path / "prefix")


def test_a_saved_prompt_is_not_read_by_another_process(bundle, tmp_path):
    first, second = new_model(bundle), new_model(bundle)
    assert first.save_prefix(tmp_path / "prefix", PROMPT) == len(PROMPT)
    assert second.load_prefix(tmp_path / "prefix") == len(PROMPT)
    longer = [*PROMPT, 7, 8]
    found = second.generate(longer, max_new_tokens=6)
    assert found.statistics.reused_tokens == len(PROMPT)
    assert sum(sum(call.num_committed) for call in calls_of(second) if call.kind == "prefill") == 1
    assert found.token_ids == new_model(bundle, prefix_cache_bytes=0).generate(longer, max_new_tokens=6).token_ids


def test_a_prompt_that_is_kept_is_saved_without_being_read_again(bundle, tmp_path):
    model = new_model(bundle)
    model.generate(PROMPT, max_new_tokens=3)
    before = len(calls_of(model))
    model.save_prefix(tmp_path / "prefix", PROMPT)
    assert [call.kind for call in calls_of(model)[before:]] == ["forward"]


def test_a_prompt_of_one_token_can_be_saved(bundle, tmp_path):
    first, second = new_model(bundle), new_model(bundle)
    assert first.save_prefix(tmp_path / "prefix", [7]) == 1
    second.load_prefix(tmp_path / "prefix")
    assert second.generate([7, 8], max_new_tokens=2).statistics.reused_tokens == 1


def test_a_snapshot_of_another_bundle_is_refused_and_nothing_is_kept(bundle, tmp_path):
    new_model(bundle).save_prefix(tmp_path / "prefix", PROMPT)
    other = new_model(write_fake_bundle(tmp_path / "bundle", block_size=5))
    with pytest.raises(SnapshotError, match="was made with the bundle"):
        other.load_prefix(tmp_path / "prefix")
    assert other.prefix_cache.statistics.tokens == 0


def test_a_prompt_larger_than_the_cache_is_neither_saved_nor_loaded(bundle, tmp_path):
    new_model(bundle).save_prefix(tmp_path / "prefix", PROMPT)
    small = new_model(bundle, prefix_cache_bytes=20 * ROW_BYTES)
    with pytest.raises(OptionError, match="holds 16 of these 30 tokens"):
        small.load_prefix(tmp_path / "prefix")
    with pytest.raises(OptionError, match="holds 16 of these 30 tokens"):
        small.save_prefix(tmp_path / "other", PROMPT)
    assert not (tmp_path / "other").exists()


def test_a_target_that_is_no_snapshot_is_refused_before_any_work(bundle, tmp_path):
    model = new_model(bundle)
    (tmp_path / "text").write_text("mine")
    with pytest.raises(OutputError, match="is no snapshot"):
        model.save_prefix(tmp_path / "text", PROMPT)
    assert not calls_of(model)


def test_a_service_saves_and_loads_beside_running_requests(bundle, tmp_path):
    model = new_model(bundle, num_slots=2)
    with Service(model, block_size=4) as service:
        handles = [service.submit([index, *PROMPT], max_new_tokens=20, ignore_eos=True) for index in range(2, 8)]
        threads = [
            threading.Thread(target=service.save_prefix, args=(tmp_path / str(index), PROMPT[: 10 + index]))
            for index in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [service.load_prefix(tmp_path / str(index)) for index in range(4)] == [10, 11, 12, 13]
        assert service.submit(PROMPT, max_new_tokens=2).result(10).statistics.reused_tokens >= 13
        assert all(handle.result(10).finish_reason == "length" for handle in handles)
        with pytest.raises(SnapshotError):
            service.load_prefix(tmp_path / "none")
    with pytest.raises(EngineError, match="closed"):
        service.load_prefix(tmp_path / "0")


def test_a_service_gives_the_tokens_that_it_gives_without_a_cache(bundle):
    generator = random.Random(0)
    given = [[*PROMPT[: generator.randrange(1, 30)], generator.randrange(2, 5)] for _ in range(60)]
    with Service(new_model(bundle, prefix_cache_bytes=0, num_slots=3), block_size=4) as service:
        expected = [found.token_ids for found in service.generate(given, max_new_tokens=12)]
    with Service(new_model(bundle, num_slots=3), block_size=4) as service:
        found = service.generate(given, max_new_tokens=12)
    assert [entry.token_ids for entry in found] == expected
    assert sum(entry.statistics.reused_tokens for entry in found) > 300


def test_turns_of_a_chat_through_the_model_read_only_what_is_new(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    bundle = write_fake_bundle(tmp_path / "bundle", files={"chat_template.jinja": template})
    model = new_model(bundle)
    messages = [{"role": "user", "content": "the cat sat"}]
    first = model.generate(messages, max_new_tokens=6)
    prompt = model.encode(messages)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "on the mat"}]
    common = shared(model.encode(messages), [*prompt, *first.token_ids])
    assert common >= len(prompt) - 1
    assert model.generate(messages, max_new_tokens=2).statistics.reused_tokens >= common - 1


def shared(first, second):
    pairs = list(zip(first, second, strict=False))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
