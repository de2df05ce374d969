"""From prompts to training samples: what each becomes, and why some are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm_export.prompts import Chat, Prompt
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.training.data.samples import Sample, digest_samples, encode_samples, with_shared_ids
from tests.fakes import EOS, byte_level_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}{{ mood }}"


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return TextCodec(tmp_path, chat_template=TEMPLATE, special_tokens={})


def encode(codec: TextCodec, *prompts: Prompt, max_length: int = 100):
    return encode_samples(prompts, codec, eos_token_id=EOS, max_length=max_length)


def test_a_sample_is_the_prompt_then_the_answer_then_the_end(codec: TextCodec):
    (sample,) = encode(codec, Prompt(id="a", content="the cat", answer=" sat")).samples
    assert sample.tokens == (*codec.encode("the cat"), *codec.encode(" sat"), EOS)
    assert sample.prompt == tuple(codec.encode("the cat"))
    assert (sample.first_start, sample.num_rows) == (sample.num_prompt - 1, len(sample.tokens) - 1)


def test_messages_are_rendered_as_in_generation(codec: TextCodec):
    messages = ({"role": "user", "content": "the cat"},)
    (sample,) = encode(codec, Prompt(id="a", content=messages, answer="x")).samples
    assert sample.prompt == tuple(codec.encode_chat(messages))


def test_arguments_of_the_chat_template_are_trained_on(codec: TextCodec):
    chat = Chat([{"role": "user", "content": "the cat"}], chat_template_kwargs={"mood": "sad"})
    (sample,) = encode(codec, Prompt(id="a", content=chat, answer="x")).samples
    assert sample.prompt == tuple(codec.encode_continuation("[user] the catsad"))


def test_what_gives_no_sample_is_counted_by_reason(codec: TextCodec):
    found = encode(
        codec,
        Prompt(id="kept", content="the cat", answer="sat"),
        Prompt(id="silent", content="the cat"),
        Prompt(id="blank", content="the cat", answer=""),
        Prompt(id="empty", content="", answer="sat"),
        Prompt(id="half", content="\ud83d", answer="sat"),
        Prompt(id="half an answer", content="the cat", answer="\ud83d"),
        Prompt(id="long", content="the cat " * 60, answer="sat"),
    )
    assert [sample.id for sample in found.samples] == ["kept"]
    assert found.dropped == {"no answer": 2, "empty prompt": 1, "does not tokenise": 2, "too long": 1}


def test_messages_without_a_template_do_not_tokenise(tmp_path: Path):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path, chat_template=None, special_tokens={})
    found = encode(codec, Prompt(id="a", content=({"role": "user", "content": "x"},), answer="y"))
    assert (found.samples, found.dropped) == ([], {"does not tokenise": 1})


def test_the_end_of_sequence_counts_for_the_length(codec: TextCodec):
    prompt = Prompt(id="a", content="the cat", answer=" sat")
    length = len(encode(codec, prompt).samples[0].tokens)
    assert len(encode(codec, prompt, max_length=length).samples) == 1
    assert encode(codec, prompt, max_length=length - 1).dropped == {"too long": 1}


def test_samples_share_the_objects_of_their_token_ids():
    """150,000 samples of 100 tokens take a third of the memory."""
    big = [1000 + index for index in range(3)]
    samples = [
        Sample(id=str(i), tokens=tuple(x + 0 for x in big), num_prompt=1, states=((0, (int("1001"), 5)),)) for i in "ab"
    ]
    one, two = with_shared_ids(samples)
    assert [one, two] == samples
    assert all(a is b for a, b in zip(one.tokens, two.tokens, strict=True))
    assert one.states[0][1][0] is two.tokens[1]


def test_the_digest_tells_any_change_of_the_data():
    sample = Sample(id="a", tokens=(1, 2, 3), num_prompt=1, states=((0, (1, 9)),))
    changed = [
        [replace(sample, id="b")],
        [replace(sample, tokens=(1, 2, 4))],
        [replace(sample, num_prompt=2)],
        [replace(sample, states=((1, (1, 9)),))],
        [replace(sample, states=())],
        [sample, sample],
        [],
    ]
    digests = {digest_samples(samples) for samples in ([sample], *changed)}
    assert len(digests) == len(changed) + 1
    assert digest_samples([sample]) == digest_samples([replace(sample)])
