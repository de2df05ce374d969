"""The API that services embed: prompts in every form, limits refused before any work, streams, stops and slots."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.bundle.contract import FixedShapes
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.errors import BundleError, EngineError, OptionError, PromptError
from cllm_export.prompts import Chat
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import prefill
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions, resolve
from cllm_export.runtime.service import Service
from tests.fakes import (
    EOS,
    PAD,
    PREFILL_CHUNK,
    FakeEngine,
    HashModel,
    ScriptModel,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    calls_of,
    greedy,
    make_geometry,
    make_model,
    properties,
    with_manifest,
    write_bundle,
    write_chat_bundle,
)

PROMPT = "the cat"
TEXT = " sat on the mat; DROP TABLE city 🙂"
FIXED = FixedShapes(batch_size=1, block_size=4, kv_length=79)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("generate") / "bundle")


@pytest.fixture(scope="module")
def byte_fallback_bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_fallback") / "bundle"
    return write_bundle(directory, tokenizer=byte_fallback_tokenizer())


@pytest.fixture(scope="module")
def fixed_bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("fixed") / "bundle", fixed_shapes=FIXED)


@pytest.fixture
def model(bundle):
    """A model whose every token follows from all before it, and is hardly ever the end."""
    return make_model(bundle, HashModel(vocab_size=200))


@pytest.fixture
def reciter(bundle):
    """A model that recites TEXT after PROMPT and ends, with drafts that are right from the second forward on."""
    return make_reciter(bundle)


def make_reciter(bundle, *, text=TEXT, window=0):
    tokenizer = byte_level_tokenizer()
    script = [*tokenizer.encode(text).ids, EOS]
    prompt_length = len(tokenizer.encode(PROMPT).ids)
    return make_model(bundle, ScriptModel(prompt_length=prompt_length, script=script, window=window))


def fake(vocab_size=32, *, max_length=64, window=None, **options):
    return FakeEngine(HashModel(vocab_size=vocab_size, window=window), make_geometry(max_length=max_length), **options)


def tokens_in(engine, slot, count):
    return [row.token for row in engine.rows[slot][:count]]


# Prefill


@pytest.mark.parametrize("length", [1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 3])
def test_a_prompt_is_written_in_chunks(length):
    engine = fake(max_length=300)
    prompt = [index % 32 for index in range(length)]
    prefill(engine, prompt, PAD)
    assert tokens_in(engine, 0, length) == prompt
    assert [len(call.input_ids[0]) for call in engine.calls[:-1]] == [PREFILL_CHUNK] * ((length - 1) // PREFILL_CHUNK)
    assert [call.write_index[0] for call in engine.calls] == list(range(0, length, PREFILL_CHUNK))
    assert {call.kind for call in engine.calls} == {"prefill"}


def test_nothing_to_prefill_takes_no_forward():
    engine = fake()
    prefill(engine, [], PAD)
    assert engine.calls == []


@pytest.mark.parametrize(("length", "chunks"), [(1, 1), (3, 1), (4, 1), (5, 2)])
def test_the_last_chunk_is_padded_to_fixed_shapes(length, chunks):
    engine = fake(fixed_shapes=FIXED)
    prompt = list(range(10, 10 + length))
    prefill(engine, prompt, PAD)
    assert tokens_in(engine, 0, length) == prompt
    assert len(engine.calls) == chunks
    assert engine.calls[-1].num_committed == [(length - 1) % 4 + 1]
    assert all(len(call.input_ids[0]) == 4 for call in engine.calls)


@pytest.mark.parametrize("fixed", [None, FIXED], ids=["open", "fixed"])
@pytest.mark.parametrize("length", range(1, 10))
def test_padding_of_the_last_chunk_changes_no_token(bundle, fixed_bundle, fixed, length):
    language_model = HashModel(vocab_size=200)
    prompt = list(range(20, 20 + length))
    generated = make_model(fixed_bundle if fixed else bundle, language_model).generate(prompt, max_new_tokens=12)
    assert list(generated.token_ids) == greedy(language_model, prompt, 12, eos=[EOS])


def test_only_the_first_slot_is_not_idle_in_prefill():
    engine = fake(num_slots=3)
    prefill(engine, [5, 6, 7], PAD)
    assert engine.calls[0].num_committed == [3, 0, 0]


# Prompts


def test_text_ids_and_messages_are_the_same_prompt(tmp_path):
    model = make_model(write_chat_bundle(tmp_path / "bundle", TEMPLATE), HashModel(vocab_size=200))
    text = "user: the cat;"
    prompts = [text, byte_level_tokenizer().encode(text).ids, MESSAGES]
    first, *others = [model.generate(prompt, max_new_tokens=9).token_ids for prompt in prompts]
    assert others == [first, first]


def test_a_prompt_of_one_token_needs_no_prefill(model):
    generated = model.generate([7], max_new_tokens=5)
    assert list(generated.token_ids) == greedy(HashModel(vocab_size=200), [7], 5)
    assert {call.kind for call in calls_of(model)} == {"forward"}


def test_the_last_token_of_the_prompt_is_decoded_not_prefilled(model):
    generated = model.generate([7, 8, 9], max_new_tokens=1, block_size=4)
    assert calls_of(model)[0].input_ids == [[7, 8]]
    assert generated.forwards[0].block[0] == 9
    assert generated.forwards[0].write_index == 2


@pytest.mark.parametrize("prompt", [5, None, b"the cat", {5}, {"role": "user"}, np.array(5)])
def test_what_is_no_prompt_is_refused(model, prompt):
    with pytest.raises(PromptError, match="a prompt is text, token ids or messages, got"):
        model.generate(prompt)


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.generate(prompt)
    assert calls_of(model) == []


@pytest.mark.parametrize("token", [-1, 100_000, 1.0, "the", None, {"role": "user"}])
def test_a_token_id_out_of_range_is_refused_with_the_range(model, token):
    largest = model.engine.geometry.vocab_size - 1
    with pytest.raises(PromptError, match=f"integers from 0 to {largest}, got"):
        model.generate([5, token])
    assert calls_of(model) == []


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": 5}], [MESSAGES[0], "the cat"]])
def test_a_malformed_message_is_refused(tmp_path, messages):
    model = make_model(write_chat_bundle(tmp_path / "bundle", TEMPLATE), HashModel(vocab_size=200))
    with pytest.raises(PromptError, match="a message must look like"):
        model.generate(messages)
    assert calls_of(model) == []


ARGUED = (
    "{% for m in messages %}{{ m.content }};{% endfor %}{{ (tools or []) | length }}{{ documents | tojson }}"
    "{{ mood }}{{ add_generation_prompt }}"
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ARGUMENTS = [
    ({"tools": TOOLS, "chat_template_kwargs": {"mood": "sad"}}, "the cat;1nullsadTrue"),
    ({"documents": [{"text": "a"}], "add_generation_prompt": False}, 'the cat;0[{"text": "a"}]False'),
    ({"continue_final_message": True}, "the cat"),
    ({"tools": None, "continue_final_message": None}, "the cat;0nullTrue"),
]


@pytest.mark.parametrize(("arguments", "rendered"), ARGUMENTS)
def test_arguments_of_the_chat_template_reach_it_in_every_way(tmp_path, arguments, rendered):
    """As keywords of a request, as a ``Chat``, and as both, where the keywords win."""
    model = make_model(write_chat_bundle(tmp_path / "bundle", ARGUED), HashModel(vocab_size=200))
    tokens = model.codec.encode_continuation(rendered)
    options = {"max_new_tokens": 6, "ignore_eos": True, "block_size": 4}
    expected = model.generate(tokens, **options).token_ids
    named = {name: value for name, value in arguments.items() if value is not None}
    given = [(MESSAGES, arguments), (Chat(MESSAGES, **named), {}), (Chat(MESSAGES, documents=[]), arguments)]
    for prompt, keywords in given if "documents" in named else given[:2]:
        assert model.encode(prompt, **{k: v for k, v in keywords.items() if v is not None}) == tokens
        assert model.generate(prompt, **options, **keywords).token_ids == expected
        assert model.stream(prompt, **options, **keywords).result().token_ids == expected
    options.pop("block_size")
    with Service(model, block_size=4) as service:
        assert service.submit(MESSAGES, **options, **arguments).result().token_ids == expected
        assert [each.token_ids for each in service.generate([MESSAGES] * 2, **options, **arguments)] == [expected] * 2


@pytest.mark.parametrize("prompt", ["the cat", [5, 6], ()])
def test_arguments_of_the_chat_template_are_refused_for_other_prompts(model, prompt):
    with pytest.raises(PromptError, match="tools is for chat messages, and the prompt has none"):
        model.generate(prompt, tools=TOOLS)


def test_an_unknown_template_is_refused_with_the_names_there_are(tmp_path):
    named = {"chat_template.jinja": "one", "more_chat_templates.json": '{"tool_use": "two", "rag": "three"}'}
    model = make_model(write_bundle(tmp_path / "bundle", files=named), HashModel(vocab_size=200))
    texts = [
        model.codec.render_chat(Chat(MESSAGES, **given)) for given in ({}, {"tools": []}, {"chat_template": "rag"})
    ]
    assert texts == ["one", "two", "three"]
    with pytest.raises(PromptError, match="no chat template named 'other': name one of default, rag, tool_use"):
        model.generate(MESSAGES, chat_template="other")


@pytest.mark.parametrize("text", ["[", "[]", '{"rag": 1}', "\xff"])
def test_templates_of_a_bundle_that_are_damaged_are_refused(tmp_path, text):
    bundle = write_bundle(tmp_path / "bundle", files={"more_chat_templates.json": text})
    with pytest.raises(BundleError, match=r"more_chat_templates\.json"):
        make_model(bundle, HashModel(vocab_size=200))


def test_messages_without_a_chat_template_are_refused(model):
    with pytest.raises(PromptError, match="no chat template"):
        model.generate(MESSAGES)


def test_text_that_no_file_could_hold_is_refused(model):
    with pytest.raises(PromptError):
        model.generate("the \ud800 cat")


# Limits and options


@pytest.mark.parametrize("act", ["generate", "stream"])
def test_a_prompt_that_leaves_no_room_is_refused_with_its_numbers(model, act):
    with pytest.raises(PromptError, match=r"prompt has 64 tokens and this model holds 64 in all"):
        getattr(model, act)([5] * 64)
    assert calls_of(model) == []


@pytest.mark.parametrize("act", ["generate", "stream"])
def test_more_new_tokens_than_fit_are_refused_with_the_numbers(model, act):
    with pytest.raises(PromptError, match=r"60 prompt tokens and 5 new ones need 65, .* holds 64: ask for at most 4"):
        getattr(model, act)([5] * 60, max_new_tokens=5)
    assert calls_of(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_request_may_fill_the_bundle_to_its_last_token(model, method):
    generated = model.generate([5] * 60, max_new_tokens=4, method=method)
    assert list(generated.token_ids) == greedy(HashModel(vocab_size=200), [5] * 60, 4)


def test_without_a_limit_a_request_takes_what_still_fits(bundle):
    endless = with_manifest(bundle, eos_token_ids=())
    generated = make_model(endless, HashModel(vocab_size=200)).generate([5] * 50)
    assert len(generated.token_ids) == 14
    assert generated.finish_reason == "length"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_new_tokens", 0, "must be an integer of at least 1, got 0"),
        ("max_new_tokens", 2.5, "must be an integer"),
        (
            "method",
            "medusa",
            "must be one of jacobi, jacobi-block, speculative, autoregressive, lookahead, got 'medusa'",
        ),
        (
            "proposer",
            "random",
            "must be one of pad, repeat, prompt, lookup, pool, model, or several joined by \\+, got 'random'",
        ),
        ("block_size", 17, "must be at most 16 for this model, got 17"),
        ("block_size", 0, "must be an integer of at least 1, got 0"),
        ("block_size", 2.5, "must be an integer or 'auto', got 2.5"),
        ("deterministic", "no", "must be True or False, got 'no'"),
        ("ignore_eos", 1, "must be True or False, got 1"),
        ("stop", ";", "must be a list of non-empty strings, got ';'"),
        ("stop", [";", ""], "must be a list of non-empty strings"),
        ("stop", [5], "must be a list of non-empty strings"),
        ("stop", 5, "must be a list of non-empty strings, got 5"),
        ("logit_bias", [5], "must map token ids to numbers"),
    ],
)
@pytest.mark.parametrize("act", ["generate", "stream"])
def test_an_option_out_of_range_is_refused_before_the_first_forward(model, act, option, value, message):
    with pytest.raises(OptionError, match=f"{option} {message}"):
        getattr(model, act)([5, 6, 7], **{option: value})
    assert calls_of(model) == []


@pytest.mark.parametrize("option", ["method", "proposer"])
def test_an_empty_name_is_refused_like_any_unknown_one(model, option):
    with pytest.raises(OptionError, match=f"{option} must be one of"):
        model.generate([5, 6, 7], **{option: ""})


@pytest.mark.parametrize(
    "option", [{"num_slots": 0}, {"num_slots": 1.5}, {"threads": 0}, {"prefix_cache_bytes": -1}], ids=str
)
def test_a_bad_option_of_load_is_refused_by_name(bundle, option):
    with pytest.raises(OptionError, match=f"{next(iter(option))} must be an integer of at least"):
        load(bundle.path, **option)


def test_a_pinned_bundle_takes_no_other_block_size(fixed_bundle):
    model = make_model(fixed_bundle, HashModel(vocab_size=200))
    with pytest.raises(OptionError, match="block_size must be 4, which this engine is pinned to, got 5"):
        model.generate([5, 6], block_size=5)
    assert calls_of(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_pinned_bundle_decodes_with_its_own_block_size(fixed_bundle, method):
    generated = make_model(fixed_bundle, HashModel(vocab_size=200)).generate([5, 6], method=method, max_new_tokens=9)
    assert {len(record.block) for record in generated.forwards} == {4}
    assert list(generated.token_ids) == greedy(HashModel(vocab_size=200), [5, 6], 9)


@pytest.mark.parametrize(("loop", "method"), [("sliding", "jacobi"), ("block", "jacobi-block"), (None, "jacobi")])
def test_the_default_method_is_the_loop_the_model_was_trained_with(bundle, loop, method):
    trained = TrainedWith(block_size=4, proposer="pad", loop=loop) if loop else None
    reciter = make_reciter(with_manifest(bundle, trained_with=trained))
    runs = {
        name: reciter.generate(PROMPT, method=name, deterministic=True).forwards for name in ("jacobi", "jacobi-block")
    }
    assert runs["jacobi"] != runs["jacobi-block"]
    assert reciter.generate(PROMPT, deterministic=True).forwards == runs[method]


def test_the_default_proposer_is_what_the_model_was_trained_with(bundle):
    trained = TrainedWith(block_size=4, proposer="repeat", loop="sliding")
    model = make_model(with_manifest(bundle, trained_with=trained), HashModel(vocab_size=200))
    assert model.generate([5, 6], max_new_tokens=1, block_size=4).forwards[0].block == [6, 6, 6, 6]
    assert model.generate([5, 6], max_new_tokens=1, block_size=3, proposer="pad").forwards[0].block == [6, PAD, PAD]


@pytest.mark.parametrize(("pad", "eos", "filled"), [(3, (EOS,), 3), (None, (8, 9), 8), (None, (), 0), (0, (8,), 0)])
def test_a_block_is_filled_with_the_pad_token_or_another_where_there_is_none(bundle, pad, eos, filled):
    model = make_model(with_manifest(bundle, pad_token_id=pad, eos_token_ids=eos), HashModel(vocab_size=200))
    assert model.generate([5, 6], max_new_tokens=1, block_size=3).forwards[0].block == [6, filled, filled]


def test_the_deterministic_block_size_is_the_bundles_and_that_of_autoregressive_is_one(model):
    for method in ("jacobi", "jacobi-block"):
        pinned = model.generate([5, 6], method=method, max_new_tokens=6, deterministic=True)
        assert {len(record.block) for record in pinned.forwards} == {4}
    alone = model.generate([5, 6], max_new_tokens=6, method="autoregressive")
    assert {len(record.block) for record in alone.forwards} == {1}


def test_a_model_that_was_trained_with_blocks_begins_with_its_own_size_and_another_with_one(bundle):
    trained = TrainedWith(block_size=8, proposer="pad", loop="sliding")
    for known, size in ((trained, 8), (None, 1)):
        times = {1: 1.0, 2: 1.5, 4: 1.7, 8: 2.0, 12: 4.0, 16: 6.0}
        model = make_model(with_manifest(bundle, trained_with=known), HashModel(vocab_size=200), forward_seconds=times)
        assert len(model.generate([5, 6], max_new_tokens=1).forwards[0].block) == size


def test_a_chosen_size_gives_the_models_own_tokens_and_serves_the_next_request(bundle):
    model = make_model(bundle, HashModel(vocab_size=200, window=0))
    for start in range(12):
        generated = model.generate([5, start], max_new_tokens=40, ignore_eos=True)
        assert list(generated.token_ids) == greedy(HashModel(vocab_size=200, window=0), [5, start], 40)
    measured = [call for call in calls_of(model) if call.num_committed == [0]]
    assert calls_of(model)[: len(measured)] == measured, "T(n) is measured before the first request, once"


def test_a_chosen_size_is_only_for_loops_that_can_change_it(model, fixed_bundle):
    with pytest.raises(OptionError, match="a block of jacobi-block keeps its size"):
        model.generate([5, 6], method="jacobi-block", block_size="auto")
    with pytest.raises(OptionError, match="exclude each other"):
        model.generate([5, 6], block_size="auto", deterministic=True)
    with pytest.raises(OptionError, match="must be an integer or 'auto', got 'best'"):
        model.generate([5, 6], block_size="best")
    for method in ("jacobi", "speculative"):
        options = GenerateOptions(method=method, block_size="auto")
        assert resolve(options, model.limits, [5, 6]).block_size == "auto"
    alone = model.generate([5, 6], method="autoregressive", block_size="auto", max_new_tokens=3)
    assert {len(record.block) for record in alone.forwards} == {1}
    pinned = make_model(fixed_bundle, HashModel(vocab_size=200)).generate([5, 6], block_size="auto", max_new_tokens=3)
    assert {len(record.block) for record in pinned.forwards} == {4}


def test_a_seeded_request_can_be_repeated(model):
    first, again, other = (
        model.generate([5, 6, 7], proposer="prompt", seed=seed, max_new_tokens=9, deterministic=True)
        for seed in (1, 1, 2)
    )
    assert first.forwards == again.forwards != other.forwards
    assert first.token_ids == other.token_ids


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_idle_slots_change_no_token(bundle, method, num_slots):
    model = make_model(bundle, HashModel(vocab_size=200), num_slots=num_slots)
    generated = model.generate([5, 6, 7], method=method, max_new_tokens=9)
    assert list(generated.token_ids) == greedy(HashModel(vocab_size=200), [5, 6, 7], 9)
    assert all(call.num_committed[1:] == [0] * (num_slots - 1) for call in calls_of(model))


# What comes back


@pytest.mark.parametrize("method", METHODS)
def test_text_ends_before_eos_and_token_ids_hold_it(bundle, method):
    generated = make_reciter(bundle).generate(PROMPT, method=method, block_size=9)
    assert generated.text == TEXT
    assert generated.token_ids[-1] == EOS
    assert generated.finish_reason == "eos"


def test_an_eos_that_is_no_special_token_leaves_no_text(bundle):
    tokenizer = byte_level_tokenizer()
    semicolon = tokenizer.token_to_id(";")
    generated = make_reciter(with_manifest(bundle, eos_token_ids=(EOS, semicolon))).generate(PROMPT)
    assert generated.text == " sat on the mat"
    assert generated.token_ids[-1] == semicolon


@pytest.mark.parametrize("method", METHODS)
def test_statistics_belong_to_the_tokens_that_came_back(reciter, method):
    generated = reciter.generate(PROMPT, method=method, max_new_tokens=7)
    statistics = generated.statistics
    assert statistics.new_tokens == len(generated.token_ids) == 7
    assert statistics.forwards == len(generated.forwards)
    assert statistics.prompt_tokens == len(byte_level_tokenizer().encode(PROMPT).ids)
    assert sum(statistics.acceptance_histogram.values()) == statistics.forwards


def test_prefill_is_no_forward_of_the_statistics(model):
    generated = model.generate(list(range(10, 40)), max_new_tokens=3, method="autoregressive")
    assert [call.kind for call in calls_of(model)] == ["prefill", "forward", "forward", "forward"]
    assert generated.statistics.forwards == 3


def test_a_second_request_starts_from_its_own_prompt(model):
    first = model.generate([5, 6, 7, 8, 9], max_new_tokens=20)
    model.generate([30, 31], max_new_tokens=9)
    again = model.generate([5, 6, 7, 8, 9], max_new_tokens=20)
    assert again.token_ids == first.token_ids


def test_a_generation_cannot_be_changed(model):
    generated = model.generate([5, 6], max_new_tokens=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        generated.text = "other"


# Stop strings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_text_is_cut_before_a_stop_string(reciter, method, block_size):
    generated = reciter.generate(PROMPT, method=method, block_size=block_size, stop=["; DROP", "zzz"])
    assert generated.text == " sat on the mat"
    assert generated.finish_reason == "stop"


@pytest.mark.parametrize("method", ["jacobi", "jacobi-block"])
def test_a_stop_string_ends_every_method_at_the_same_token(reciter, method):
    alone = reciter.generate(PROMPT, method="autoregressive", stop=["; DROP"])
    generated = reciter.generate(PROMPT, method=method, block_size=16, stop=["; DROP"])
    assert generated.token_ids == alone.token_ids
    assert generated.statistics.new_tokens == alone.statistics.new_tokens


@pytest.mark.parametrize("method", METHODS)
def test_where_stop_strings_overlap_every_method_gives_the_same_text(reciter, method):
    generated = reciter.generate(PROMPT, method=method, block_size=16, stop=["mat; DROP", "DR"])
    assert generated.text == " sat on the mat; "


@pytest.mark.parametrize("method", METHODS)
def test_the_text_of_a_special_token_is_a_stop_string_for_every_method(bundle, method):
    """The token stops the request, is its last one, and appears in no text and no delta."""
    model = make_reciter(bundle, text=" sat<pad> on the mat")
    generated = model.generate(PROMPT, method=method, block_size=16, stop=["<pad>"])
    assert (generated.text, generated.finish_reason) == (" sat", "stop")
    assert generated.token_ids[-1] == PAD
    with model.stream(PROMPT, method=method, block_size=16, stop=["<pad>"]) as stream:
        assert "".join(stream) == " sat"
    assert model.generate(PROMPT, method=method, block_size=16).text == " sat on the mat"


def test_a_stop_string_that_never_comes_changes_nothing(reciter):
    stopped, plain = (reciter.generate(PROMPT, stop=stop) for stop in (["TABLES"], []))
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == (plain.text, plain.token_ids, "eos")


def test_the_beginning_of_a_stop_string_at_the_end_is_text(reciter):
    generated = reciter.generate(PROMPT, stop=["🙂🙂"])
    assert generated.text == TEXT


def test_a_stop_string_wins_over_an_eos_behind_it(bundle):
    generated = make_reciter(bundle, text=" sat; ").generate(PROMPT, block_size=16, stop=[";"])
    assert (generated.text, generated.finish_reason) == (" sat", "stop")


# Streams


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [[], ["; DROP"], ["🙂🙂"]], ids=["no stop", "stop", "stop that never comes"])
def test_a_stream_gives_the_text_of_generate(reciter, method, stop):
    whole = reciter.generate(PROMPT, method=method, stop=stop, deterministic=True)
    stream = reciter.stream(PROMPT, method=method, stop=stop, deterministic=True)
    assert "".join(stream) == whole.text
    result = stream.result()
    assert (result.text, result.token_ids, result.finish_reason) == (whole.text, whole.token_ids, whole.finish_reason)
    assert result.forwards == whole.forwards


@given(seed=st.integers(0, 999), block_size=st.integers(1, 9), limit=st.integers(1, 40))
@properties
def test_deltas_of_arbitrary_bytes_make_up_the_text_of_generate(bundle, seed, block_size, limit):
    check_stream(bundle, HashModel(vocab_size=250, window=1, seed=seed), block_size=block_size, max_new_tokens=limit)


@given(seed=st.integers(0, 999), block_size=st.integers(1, 9), limit=st.integers(1, 40))
@properties
def test_deltas_of_a_byte_fallback_tokenizer_make_up_the_text_of_generate(
    byte_fallback_bundle, seed, block_size, limit
):
    language_model = HashModel(vocab_size=250, window=1, seed=seed)
    check_stream(byte_fallback_bundle, language_model, block_size=block_size, max_new_tokens=limit)


def test_a_request_that_ends_inside_a_character_streams_the_text_of_generate(byte_fallback_bundle):
    script = byte_fallback_tokenizer().encode("hi\n🙂").ids
    language_model = ScriptModel(prompt_length=2, script=script)
    check_stream(byte_fallback_bundle, language_model, max_new_tokens=len(script) - 1)


def check_stream(bundle, language_model, **options):
    model = make_model(bundle, language_model)
    assert "".join(model.stream([5, 6], **options)) == model.generate([5, 6], **options).text


def test_no_delta_is_empty(reciter):
    assert all(reciter.stream(PROMPT, method="autoregressive", stop=["sat on a"]))


def test_a_delta_comes_before_the_request_has_ended(reciter):
    stream = reciter.stream(PROMPT, method="autoregressive")
    assert TEXT.startswith(next(stream))
    assert len(calls_of(reciter)) < len(TEXT)
    stream.close()


def test_asking_a_stream_for_its_result_runs_what_was_not_read(reciter):
    whole = reciter.generate(PROMPT)
    with reciter.stream(PROMPT) as stream:
        next(stream)
        assert stream.result().text == whole.text


def test_a_closed_stream_has_the_result_of_what_it_gave(reciter):
    stream = reciter.stream(PROMPT, method="autoregressive")
    given_text = next(stream)
    stream.close()
    assert stream.result().text == given_text
    assert list(stream) == []


@pytest.mark.parametrize("act", ["generate", "stream"])
def test_a_second_request_while_a_stream_is_open_is_refused_until_it_is_closed(reciter, act):
    def request():
        made = getattr(reciter, act)(PROMPT)
        return made.text if act == "generate" else "".join(made)

    stream = reciter.stream(PROMPT)
    next(stream)
    num_calls = len(calls_of(reciter))
    with pytest.raises(EngineError, match="another request is running"):
        request()
    assert len(calls_of(reciter)) == num_calls
    stream.close()
    assert request() == TEXT


def test_a_refused_request_does_not_disturb_the_open_stream(reciter):
    stream = reciter.stream(PROMPT)
    deltas = [next(stream)]
    with pytest.raises(EngineError):
        reciter.generate(PROMPT)
    assert "".join([*deltas, *stream]) == TEXT


def test_a_stream_read_to_its_end_frees_the_model(reciter):
    list(reciter.stream(PROMPT))
    assert reciter.generate(PROMPT).text == TEXT


def test_leaving_the_with_block_frees_the_model(reciter):
    with reciter.stream(PROMPT) as stream:
        next(stream)
    assert reciter.generate(PROMPT).text == TEXT


def test_a_stream_that_was_never_read_holds_nothing(reciter):
    stream = reciter.stream(PROMPT)
    assert reciter.generate(PROMPT).text == TEXT
    assert "".join(stream) == TEXT


def test_a_stream_that_was_refused_has_no_result(reciter):
    refused = reciter.stream(PROMPT)
    with reciter.stream(PROMPT) as running:
        next(running)
        with pytest.raises(EngineError):
            next(refused)
        with pytest.raises(EngineError):
            refused.result()


def test_a_failing_engine_frees_the_model(bundle):
    class FailingOnce(FakeEngine):
        def forward(self, *arguments, **options):
            if not self.calls:
                self.prefill(*arguments)
                raise EngineError("out of memory")
            return super().forward(*arguments, **options)

    language_model = HashModel(vocab_size=200)
    engine = FailingOnce(language_model, bundle.manifest.geometry)
    model = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle))
    with pytest.raises(EngineError, match="out of memory"):
        model.generate([5])
    assert list(model.generate([5], max_new_tokens=3).token_ids) == greedy(language_model, [5], 3)


@pytest.mark.parametrize("method", METHODS[:2])
def test_an_engine_that_accepts_nothing_ends_in_an_error_and_not_in_a_loop(bundle, method):
    class Stuck(FakeEngine):
        def forward(self, batch, **options):
            forward = super().forward(batch, **options)
            return forward._replace(num_accepted=[0] * len(forward.num_accepted))

    engine = Stuck(HashModel(vocab_size=200), bundle.manifest.geometry)
    with pytest.raises(EngineError, match="makes no token known"):
        Model(bundle.manifest, engine, TextCodec.of_bundle(bundle)).generate([5, 6, 7], method=method)


def test_a_stream_that_failed_raises_what_it_failed_with_again(bundle):
    class Broken(FakeEngine):
        def forward(self, *arguments, **options):
            raise EngineError("out of memory")

    engine = Broken(HashModel(vocab_size=200), bundle.manifest.geometry)
    stream = Model(bundle.manifest, engine, TextCodec.of_bundle(bundle)).stream([5], block_size=4)
    for read in (lambda: next(stream), stream.result):
        with pytest.raises(EngineError, match="out of memory"):
            read()


def test_a_stream_that_was_closed_was_cancelled(reciter):
    stream = reciter.stream(PROMPT, method="autoregressive")
    next(stream)
    stream.close()
    assert stream.result().finish_reason == "cancelled"
