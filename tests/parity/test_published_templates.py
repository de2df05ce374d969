"""Templates in the style of published ones render what transformers renders, for every kind of conversation."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from cllm_export.errors import PromptError
from cllm_export.runtime.decoding.chat_template import ChatTemplate
from cllm_export.runtime.decoding.text import TextCodec

FIXTURES = Path(__file__).parent.parent / "fixtures"
TEMPLATES = {path.name.removesuffix("-chat.jinja"): path.read_text() for path in sorted(FIXTURES.glob("*-chat.jinja"))}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" <of> a café & a town.',
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL: dict[str, Any] = {"id": "abcdefghi", "type": "function"}
QUESTION = {"role": "user", "content": "What is the weather in Zürich?  "}
SYSTEM = {"role": "system", "content": " Be brief. /no_think"}


def calls(*arguments: Any) -> list[dict[str, Any]]:
    return [{**CALL, "function": {"name": "weather", "arguments": given}} for given in arguments]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "system alone": [SYSTEM],
    "override": [{"role": "system", "content": "/override You are a bot."}, QUESTION],
    "turns": [QUESTION, {"role": "assistant", "content": "\n <sunny> 🌞 "}, {"role": "user", "content": ""}],
    "answered": [SYSTEM, QUESTION, {"role": "assistant", "content": "Sunny, \n with  spaces. \n"}],
    "two questions": [QUESTION, QUESTION],
    "call": [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": calls({"town": "Zürich", "n": [1.5, None]})},
    ],
    "call as text": [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls('{"town": "Zürich"}')}],
    "calls and results": [
        QUESTION,
        {"role": "assistant", "tool_calls": calls({"town": "A"}, {"town": "B"}, {"town": "C"})},
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": '{"rain": true}', "name": "weather"},
        {"role": "assistant", "content": "Mixed."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": " Look: "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
    ],
    "parts answered": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello "}, {"type": "image", "url": "x"}]},
    ],
    "unknown role": [{"role": "critic", "content": "Hm."}, QUESTION],
    **{
        f"reasoning as {name}": [
            QUESTION,
            {"role": "assistant", "content": "Sunny.", name: " It is June. \n", "name": None},
        ]
        for name in ("reasoning", "reasoning_content", "thinking")
    },
    "two reasonings": [QUESTION, {"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"}],
    "reasoning in text": [QUESTION, {"role": "assistant", "content": "<think>\nJune\n</think>\n\nSunny."}, QUESTION],
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tools": {"tools": [TOOL, TOOL]},
    "no tools": {"tools": []},
    "documents": {"documents": [{"title": "a", "text": "b\nc"}, {"text": "é"}]},
    "both": {"tools": [TOOL], "documents": [{"title": "a", "text": "b"}]},
    "no thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "variables": {
        "chat_template_kwargs": {
            "xml_tools": [TOOL],
            "python_tools": ["def f(): ..."],
            "controls": {"length": "long", "a": 1},
            "date_string": "1 May 2025",
            "tools_in_user_message": False,
            "bos_token": "<own>",
            "citations": None,
        },
        "tools": [TOOL],
    },
    "no prompt": {"add_generation_prompt": False},
    "continued": {"continue_final_message": True},
    "continued reasoning": {"continue_final_message": "reasoning_content"},
    "continued thinking": {"continue_final_message": "thinking", "tools": [TOOL]},
    "continued nonsense": {"continue_final_message": "frobnicate"},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    made = TokenizersBackend(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), **SPECIAL_TOKENS)
    assert isinstance(made, PreTrainedTokenizerBase)
    return made


@pytest.fixture
def codec_of(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return lambda template: TextCodec(tmp_path, chat_template=template, special_tokens=SPECIAL_TOKENS)


def by_transformers(
    tokenizer: PreTrainedTokenizerBase, template: Any, messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> str | None:
    """What transformers renders; None if it or the template refuses the chat."""
    given = {"add_generation_prompt": "continue_final_message" not in arguments, **arguments}
    given |= given.pop("chat_template_kwargs", {})
    tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    except Exception:  # a template may fail in any way
        return None
    assert isinstance(text, str)
    return text


def by_codec(codec: TextCodec, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    from cllm_export.prompts import Chat

    try:
        return codec.render_chat(Chat(messages, **arguments))
    except PromptError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation_renders_as_in_transformers(tokenizer: PreTrainedTokenizerBase, codec_of: Any, name: str):
    """With every set of arguments. What one side refuses, the other refuses."""
    codec, counts = codec_of(TEMPLATES[name]), Counter[bool]()
    for (key, messages), (title, arguments) in itertools.product(CONVERSATIONS.items(), ARGUMENTS.items()):
        expected = by_transformers(tokenizer, TEMPLATES[name], messages, arguments)
        assert by_codec(codec, messages, arguments) == expected, (key, title)
        counts[expected is None] += 1
    assert counts[False] > 50, "too few conversations were rendered to tell"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_published_template_passes_the_trial_of_a_build(name: str):
    assert ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS).fault() is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[1].content + '' }}",
        "{% for part in messages[0].content %}{{ part['text'] + '' }}{% endfor %}",
        "{{ tools[0].function.name + '' }}",
        "{{ documents[0].text + '' }}",
    ],
)
def test_a_template_made_for_other_chats_than_the_first_trial_is_sound(template: str):
    assert ChatTemplate(template, {}).fault() is None


NAMED = [
    {"default": "one {{ messages[0].content }}", "tool_use": "two {{ tools | length }}", "rag": "three"},
    {"tool_use": "two", "rag": "three"},
    {"default": "one"},
    "alone",
]


@pytest.mark.parametrize("templates", NAMED)
@pytest.mark.parametrize("name", [None, "default", "tool_use", "rag", "frobnicate"])
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
def test_a_named_template_is_chosen_as_in_transformers(
    tokenizer: PreTrainedTokenizerBase, codec_of: Any, templates: Any, name: str | None, tools: Any
):
    """Where transformers would take an unknown name as the text of a template, the name is refused."""
    known = templates if isinstance(templates, dict) else {"default": templates}
    expected = None
    if name is None or name in known:
        arguments = {"tools": tools, **({} if isinstance(templates, str) or name is None else {"chat_template": name})}
        expected = by_transformers(tokenizer, templates, [QUESTION], arguments)
    assert by_codec(codec_of(templates), [QUESTION], {"tools": tools, "chat_template": name}) == expected
