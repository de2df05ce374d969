"""Prompt files: what they may hold, and that a malformed line is named."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import CllmExportError, OptionError, PromptError
from cllm_export.prompts import Chat, Prompt, check_messages, parse_prompts, parse_stdin, read_prompts
from tests.fakes import properties

MESSAGES = ({"role": "user", "content": "hello"},)


def parse(data, *, source="prompts.jsonl", limit=None):
    return parse_prompts(data, source=source, limit=limit)


def test_json_lines_give_prompt_id_and_answer():
    data = b'{"prompt": "one", "id": "a", "answer": "1"}\n{"prompt": "two", "id": 7, "answer": null}\n'
    assert parse(data) == [Prompt(id="a", content="one", answer="1"), Prompt(id="7", content="two")]


def test_the_line_number_stands_in_for_a_missing_id():
    prompts = parse(b'{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert [prompt.id for prompt in prompts] == ["1", "3"]


def test_the_line_number_stands_in_for_an_id_of_null():
    assert parse(b'{"prompt": "one", "id": null}')[0].id == "1"


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (('{"prompt": "a", "id": 2}', '{"prompt": "b"}'), ("2", "1")),
        (('{"prompt": "a", "id": 1}', "", '{"prompt": "b", "id": "1"}'), ("3", "1")),
        (('{"prompt": "a"}', '{"prompt": "b", "id": "x"}', '{"prompt": "c", "id": "x"}'), ("3", "2")),
    ],
)
def test_an_id_of_two_rows_is_refused_with_both_lines(rows, lines):
    """Integers and text are one kind of id, and a row without one has its line number."""
    with pytest.raises(PromptError, match=rf"prompts.jsonl:{lines[0]}: the id .* is also that of line {lines[1]}:"):
        parse("\n".join(rows).encode())


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


def test_a_byte_order_mark_is_no_part_of_a_prompt():
    bom = b"\xef\xbb\xbf"
    assert parse(bom + b"a", source="p.txt") == [Prompt(id="1", content="a")]
    assert parse(bom + b'{"prompt": "a"}', source="p.txt") == [Prompt(id="1", content="a")]
    assert parse_stdin(bom + b'{"prompt": "a"}\n') == [Prompt(id="1", content="a")]
    assert parse_stdin(bom + b"a\nb\r\n") == [Prompt(id="1", content="a\nb")]


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b"\xef\xbb\xbf"])
def test_an_empty_standard_input_says_what_to_do_next(data):
    with pytest.raises(PromptError, match=r"prompt is empty: send text or JSON Lines, or give a prompt as an argument"):
        parse_stdin(data)


def test_a_limit_is_for_several_prompts_of_standard_input():
    assert len(parse_stdin(b'{"prompt": "a"}\n{"prompt": "b"}', limit=1)) == 1
    with pytest.raises(OptionError, match="limit is for several prompts"):
        parse_stdin(b"a", limit=1)


def test_a_limit_takes_the_first_prompts_and_does_not_read_on():
    data = b'{"prompt": "one"}\n{"prompt": "two"}\nnot json\n'
    assert [prompt.content for prompt in parse(data, limit=2)] == ["one", "two"]


def test_a_limit_above_the_number_of_prompts_takes_all():
    assert len(parse(b"a\nb", source="p.txt", limit=5)) == 2


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n"])
@pytest.mark.parametrize("source", ["p.jsonl", "p.txt"])
def test_a_file_without_prompts_is_refused(data, source):
    with pytest.raises(PromptError, match=f"{source} holds no prompt: write one a line, as text or as JSON like"):
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
    [(b'{"question": "one", "id": 1}', "id, question"), (b"{}", "nothing"), (b'{"prompt": null}', "nothing")],
)
def test_a_line_without_a_prompt_is_refused_with_what_it_has(line, names):
    with pytest.raises(PromptError, match=f"needs a string `prompt` or a list `messages`; it has {names}"):
        parse(line)


WRONG_ROWS = {
    '{"prompt": 5}': "`prompt` must be text, got 5",
    '{"prompt": ["a"]}': r"`prompt` must be text, got \['a'\]",
    '{"messages": "a"}': "`messages` must be a list of messages, got 'a'",
    '{"messages": {"role": "user", "content": "a"}}': "`messages` must be a list of messages",
    '{"prompt": "a", "answer": 5}': "`answer` must be text, got 5",
    '{"prompt": "a", "answer": 0.5}': "`answer` must be text, got 0.5",
    '{"prompt": "a", "answer": true}': "`answer` must be text, got True",
    '{"prompt": "a", "answer": ["b"]}': r"`answer` must be text, got \['b'\]",
    '{"prompt": "a", "answer": {"b": 1}}': "`answer` must be text, got {'b': 1}",
    '{"prompt": "a", "id": true}': "`id` must be text or an integer, got True",
    '{"prompt": "a", "id": 1.5}': "`id` must be text or an integer, got 1.5",
    '{"prompt": "a", "kind": 1}': "`kind` must be text, got 1",
    '{"prompt": "a", "tables": 3}': "`tables` must be a list of tables, got 3",
    '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}': "both `prompt` and `messages`",
    '{"prompt": "a", "Answer": "b"}': "unknown key 'Answer': a row has prompt, messages, id, answer",
    '{"prompt": "a", "reference": null}': "unknown key 'reference'",
    '{"prompt": "a", "tools": []}': "`tools` is for `messages`, and the row has a `prompt`",
    '{"prompt": "a", "prompt": "b"}': "malformed JSON: the key 'prompt' stands twice",
    '{"messages": [{"role": "user", "role": "system", "content": "a"}]}': "the key 'role' stands twice",
    '{"prompt": NaN}': "malformed JSON: NaN is no number of JSON",
    '{"prompt": "a", "x": -Infinity}': "malformed JSON: -Infinity is no number",
    '{"prompt": "a", "x": 1e999}': "malformed JSON: 1e999 is no number of JSON, or too large",
    '{"prompt": "a", "id": ' + "7" * 5000 + "}": "malformed JSON",
    '{"prompt": "a"} {"prompt": "b"}': "malformed JSON: Extra data",
    '{"\\\\ud83d": 1}': r"it has \\ud83d",
    "{": "each line must hold one whole object",
    '{"prompt": "\\ud83d"}': r"`prompt` is not valid Unicode: it holds \\ud83d, half of a surrogate pair",
    '{"prompt": "a", "answer": "\\uDC00"}': "`answer` is not valid Unicode",
    '{"messages": [{"role": "user", "content": "a\\ud83d"}]}': "`messages` is not valid Unicode",
}


@pytest.mark.parametrize("row", WRONG_ROWS, ids=lambda row: row[:60])
def test_a_row_that_breaks_the_schema_is_refused_with_its_line(row):
    with pytest.raises(PromptError, match=f"^prompts\\.jsonl:2: .*{WRONG_ROWS[row]}"):
        parse(b'{"prompt": "one"}\n' + row.encode())


def test_an_error_shows_no_more_than_the_start_of_a_long_value():
    with pytest.raises(PromptError) as error:
        parse(b'{"prompt": ["' + b"a" * 10**6 + b'"]}')
    assert len(str(error.value)) < 200


def test_a_long_line_is_one_prompt():
    text = "word " * 10**6
    assert parse(json.dumps({"prompt": text}).encode())[0].content == text


def test_an_escaped_pair_of_surrogates_is_one_character():
    assert parse(b'{"prompt": "\\ud83d\\ude42"}')[0].content == "\U0001f642"


def test_the_fields_of_a_score_are_kept():
    (prompt,) = parse(b'{"prompt": "a", "answer": "b", "kind": "c", "tables": [{"name": "d"}]}')
    assert (prompt.kind, prompt.tables) == ("c", ({"name": "d"},))


ARGUMENTS = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "documents": [{"title": "a", "text": "b"}],
    "chat_template": "tool_use",
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
}


def test_arguments_of_the_chat_template_stay_with_the_messages():
    row = {"messages": list(MESSAGES), **ARGUMENTS}
    assert parse(json.dumps(row).encode())[0].content == Chat(MESSAGES, **ARGUMENTS)
    row = {"messages": list(MESSAGES), "continue_final_message": True, "tools": None}
    assert parse(json.dumps(row).encode())[0].content == Chat(MESSAGES, continue_final_message=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tools": {"name": "f"}}, "tools must be a list of objects, got {'name': 'f'}"),
        ({"tools": ["f"]}, "tools must be a list of objects, got 'f'"),
        ({"documents": "a"}, "documents must be a list of objects, got 'a'"),
        ({"documents": [1]}, "documents must be a list of objects, got 1"),
        ({"chat_template": 1}, "chat_template must be the name of one of the model's templates, got 1"),
        ({"chat_template_kwargs": ["a"]}, r"chat_template_kwargs must be an object, got \['a'\]"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not hold tools: give it beside them"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not hold messages"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt must be true or false, got 'yes'"),
        ({"continue_final_message": 1}, "continue_final_message must be true, false or the name of a field, got 1"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message exclude each other",
        ),
    ],
)
def test_a_wrong_argument_of_the_chat_template_is_refused_by_name(wrong, said):
    with pytest.raises(PromptError, match=f"^{said}"):
        Chat(MESSAGES, **wrong)
    row = {"messages": list(MESSAGES), **wrong}
    with pytest.raises(PromptError, match=f"prompts.jsonl:1: {said}"):
        parse(json.dumps(row).encode())


def test_a_tool_that_is_no_json_value_is_refused():
    with pytest.raises(PromptError, match=r"tools: <function parse at .* is no JSON value"):
        Chat(MESSAGES, tools=[parse])
    with pytest.raises(PromptError, match="is no JSON value"):
        Chat(MESSAGES, tools=[{"function": parse}])


def test_a_value_nested_too_deep_is_refused():
    deep: list[object] = []
    deep.append(deep)
    with pytest.raises(PromptError, match="tools: nested too deep"):
        Chat(MESSAGES, tools=[{"a": deep}])


class Colour(enum.StrEnum):
    RED = "red"


@dataclass
class Record:
    role: str
    content: object


class Dumped:
    def model_dump(self):
        return {"role": "user", "content": "hi", "extra": None}


def test_objects_in_messages_become_the_json_values_that_they_stand_for():
    """A template must get no methods to call. Messages of an API's client are often pydantic objects."""
    chat = Chat([Record("user", [{"n": np.int64(3), "b": np.bool_(False), "c": Colour.RED}]), Dumped()])
    assert chat.messages == (
        {"role": "user", "content": [{"n": 3, "b": False, "c": "red"}]},
        {"role": "user", "content": "hi", "extra": None},
    )
    part = chat.messages[0]["content"][0]
    assert [type(value) for value in part.values()] == [int, bool, str]


@pytest.mark.parametrize(
    "message",
    [
        '{"role": "user", "content": [{"type": "text", "text": "a"}]}',
        '{"role": "user", "content": []}',
        '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}',
        '{"role": "assistant", "reasoning_content": "hm"}',
        '{"role": "tool", "content": "3", "tool_call_id": "x"}',
    ],
)
def test_content_in_parts_and_messages_of_tools_are_messages(message):
    assert parse(f'{{"messages": [{message}]}}'.encode())[0].content == (json.loads(message),)


@pytest.mark.parametrize(
    "message",
    [
        '"hello"',
        '{"role": "user"}',
        '{"content": "hello"}',
        "null",
        '{"role": "user", "content": 5}',
        '{"role": 1, "content": "a"}',
        '{"role": "user", "content": null}',
        '{"role": "user", "content": ["a"]}',
    ],
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
