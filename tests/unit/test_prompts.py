"""Prompt files: what they may hold, and that a malformed line is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import CllmExportError, PromptError
from cllm_export.prompts import Prompt, check_messages, parse_prompts, read_prompts
from tests.fakes import properties

MESSAGES = ({"role": "user", "content": "hello"},)


def parse(data, *, source="prompts.jsonl", limit=None):
    return parse_prompts(data, source=source, limit=limit)


def test_json_lines_give_prompt_id_and_answer():
    data = b'{"prompt": "one", "id": "a", "answer": "1"}\n{"prompt": "two", "id": 7, "answer": 2}\n'
    assert parse(data) == [Prompt(id="a", content="one", answer="1"), Prompt(id="7", content="two", answer="2")]


def test_the_line_number_stands_in_for_a_missing_id():
    prompts = parse(b'{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert [prompt.id for prompt in prompts] == ["1", "3"]


def test_the_line_number_stands_in_for_an_id_of_null():
    assert parse(b'{"prompt": "one", "id": null}')[0].id == "1"


def test_messages_are_kept_as_they_are():
    data = b'{"messages": [{"role": "user", "content": "hello"}]}'
    assert parse(data) == [Prompt(id="1", content=MESSAGES)]


def test_plain_text_is_one_prompt_a_line():
    data = b"first line\n\n  two: {\n"
    assert parse(data, source="prompts.txt") == [
        Prompt(id="1", content="first line"),
        Prompt(id="3", content="  two: {"),
    ]


def test_a_file_that_starts_with_a_brace_is_json_lines_whatever_its_name():
    assert parse(b'\n {"prompt": "one"}', source="prompts.txt")[0].content == "one"


@pytest.mark.parametrize(("data", "source"), [(b'{"prompt": "a"}\r\n', "p.jsonl"), (b"a\r\n", "p.txt")])
def test_windows_line_ends_are_no_part_of_a_prompt(data, source):
    assert parse(data, source=source) == [Prompt(id="1", content="a")]


def test_a_limit_takes_the_first_prompts_and_does_not_read_on():
    data = b'{"prompt": "one"}\n{"prompt": "two"}\nnot json\n'
    assert [prompt.content for prompt in parse(data, limit=2)] == ["one", "two"]


def test_a_limit_above_the_number_of_prompts_takes_all():
    assert len(parse(b"a\nb", source="p.txt", limit=5)) == 2


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n"])
@pytest.mark.parametrize("source", ["p.jsonl", "p.txt"])
def test_a_file_without_prompts_is_refused(data, source):
    with pytest.raises(PromptError, match=f"{source} holds no prompt"):
        parse(data, source=source)


def test_invalid_utf8_is_refused_with_line_and_byte():
    with pytest.raises(PromptError, match=r"p\.txt:2: not valid UTF-8 at byte 3"):
        parse(b"fine\nnot\xff\n", source="p.txt")


def test_malformed_json_is_refused_with_its_line():
    with pytest.raises(PromptError, match=r"prompts\.jsonl:2: malformed JSON"):
        parse(b'{"prompt": "one"}\n{"prompt": \n')


def test_json_nested_too_deep_is_refused_with_its_line():
    with pytest.raises(PromptError, match=r"prompts\.jsonl:1"):
        parse(b'{"prompt": ' + b"[" * 100_000)


@pytest.mark.parametrize("line", [b'["one"]', b'"one"', b"1", b"null"])
def test_a_line_that_is_no_object_is_refused(line):
    with pytest.raises(PromptError, match=r"prompts\.jsonl:1: expected an object"):
        parse(line)


@pytest.mark.parametrize(
    ("line", "names"),
    [(b'{"question": "one", "id": 1}', "id, question"), (b"{}", "nothing"), (b'{"prompt": 1}', "prompt")],
)
def test_a_line_without_a_prompt_is_refused_with_what_it_has(line, names):
    with pytest.raises(PromptError, match=f"needs a string `prompt` or a list `messages`; it has {names}"):
        parse(line)


@pytest.mark.parametrize(
    "message",
    ['"hello"', '{"role": "user"}', '{"content": "hello"}', "null", '{"role": "user", "content": 5}'],
)
def test_a_message_without_role_and_content_as_text_is_refused_with_its_line(message):
    with pytest.raises(PromptError, match=r"prompts\.jsonl:1: a message must look like"):
        parse(f'{{"messages": [{message}]}}'.encode())


def test_a_chat_without_messages_is_refused():
    with pytest.raises(PromptError, match="must not be empty"):
        parse(b'{"messages": []}')


def test_messages_pass_their_check_as_a_tuple():
    assert check_messages(list(MESSAGES), "prompt") == MESSAGES


def test_a_prompt_file_is_read_from_disk(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "naïve 🙂"}\n', encoding="utf-8")
    assert read_prompts(path) == [Prompt(id="1", content="naïve 🙂")]


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_prompt_file_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    with pytest.raises(PromptError, match="cannot read prompts from"):
        read_prompts(tmp_path / name)


@given(data=st.binary(max_size=60), source=st.sampled_from(["p.jsonl", "p.txt"]))
@properties
def test_any_bytes_are_prompts_or_refused_on_purpose(data, source):
    try:
        prompts = parse(data, source=source)
    except CllmExportError:
        return
    assert prompts
