"""Chat templates: they write messages as the text that a model was trained on, as transformers renders it.

A template is code from the checkpoint. It runs in Jinja's sandbox, and sees only the chat and special tokens, all as
plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cllm_export.errors import PromptError
from cllm_export.prompts import Chat, Message

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The keys that a message may use for the reasoning of the assistant. Templates get it under the first two."""

_TAG = "CONTINUED_TO_HERE "
"""Marks the end of the message to continue. Its space tells whether the template strips messages."""

_USER = {"role": "user", "content": "Hello"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_TRIALS = (
    Chat([_USER]),
    Chat([{"role": "system", "content": "Be brief."}, _USER]),
    Chat([_USER, {"role": "assistant", "content": "Hello!"}, _USER]),
    Chat([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]),
    Chat([_USER], tools=[_TOOL]),
    Chat([_USER], documents=[{"title": "A", "text": "a"}]),
)


class ChatTemplate:
    """A compiled template, with the special tokens that it may refer to by name.

    Raises:
        ValueError: the text is no valid template. The message says why, with the line if Jinja gives it.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self._text = text
        self._special_tokens = dict(special_tokens)
        try:
            self._template: Template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # such as SyntaxError or RecursionError from the Python code that Jinja makes
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def render(self, chat: Chat) -> str:
        """The text of a chat, up to the start of the assistant's turn or to the end of the message to continue.

        Raises:
            PromptError: the template refuses the chat, or fails on it.
        """
        try:
            return self._continued(chat) if chat.continue_final_message else self._render(chat)
        except PromptError:
            raise
        except Exception as error:  # a template may fail in any way
            raise PromptError(f"the chat template refuses these messages: {error}") from None

    def fault(self) -> str | None:
        """The reason why this template cannot render one user message; None if it can.

        Where it fails, it may still be made for other chats: with a system turn, content in parts, tools or documents.
        It is at fault only if it fails on all of them. Nor is a template at fault that calls ``raise_exception``.
        """
        first = None
        for trial in _TRIALS:
            try:
                self._render(trial).encode("utf-8")
            except _Refusal:
                return None
            except Exception as error:  # a template may fail in any way
                first = first or f"it fails on a message of a user: {type(error).__name__}: {error}"
            else:
                return None
        return first

    def _render(self, chat: Chat, messages: Sequence[Message] | None = None) -> str:
        """The text of a chat, or of other messages with its arguments."""
        return self._template.render(
            {
                **self._special_tokens,
                **(chat.chat_template_kwargs or {}),
                "messages": messages or _as_templates_read_them(chat.messages),
                "tools": None if chat.tools is None else list(chat.tools),
                "documents": None if chat.documents is None else list(chat.documents),
                "add_generation_prompt": chat.is_prompted,
            }
        )

    def _continued(self, chat: Chat) -> str:
        """The text of a chat up to the end of its final message, which is tagged to be found in the text."""
        field = "content" if chat.continue_final_message is True else str(chat.continue_final_message)
        messages = _as_templates_read_them(chat.messages)
        final = messages[-1]
        if (given := final.get(field)) is None:
            raise PromptError(f"continue_final_message: the final message has no {field} to continue")
        copies = [name for name in REASONING_FIELDS if final.get(name) == given]
        tagged = copies if field in REASONING_FIELDS else [field]
        if not any(name in self._text for name in tagged):
            raise PromptError(f"continue_final_message: the chat template does not read {field} of a message")
        content, text = _tagged(given, field)
        rendered = self._render(chat, [*messages[:-1], final | dict.fromkeys(tagged, content)])
        end = rendered.rfind(_TAG.strip())
        if end < 0 or text.strip() not in rendered:
            raise PromptError("continue_final_message: the chat template leaves out a part of the final message")
        is_whole = rendered.startswith(_TAG, end)
        return rendered[:end] if is_whole else rendered[:end].rstrip()


def _tagged(content: Any, field: str) -> tuple[Any, str]:
    """The content with the tag at its end, or at the end of its last part that is text; and the text before the tag.

    Raises:
        PromptError: the content is neither text nor parts with a text.
    """
    if isinstance(content, str):
        return content + _TAG, content
    parts = list(content) if isinstance(content, list | tuple) else []
    for index in reversed(range(len(parts))):
        if isinstance(parts[index], Mapping) and isinstance(text := parts[index].get("text"), str):
            return [*parts[:index], {**parts[index], "text": text + _TAG}, *parts[index + 1 :]], text
    raise PromptError(f"continue_final_message: {field} of the final message holds no text to continue")


class _Refusal(Exception):  # noqa: N818 - a refusal by the template is no error of this package
    """A template called ``raise_exception``."""


def _as_templates_read_them(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without keys whose value is None, and with reasoning under the keys that templates read."""
    read = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[field] for field in REASONING_FIELDS if field in given), None)
        own = {} if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}
        read.append(own or given)
    return read


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training. Here its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_body"), [], [], body).set_lineno(line)

    @staticmethod
    def render_body(caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON of a value, without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """``dict`` without its attributes, which would give access to Python's internals."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        return dict.fromkeys(*keys)


class _Namespace(Namespace):
    """``namespace`` that refuses private names, which would give access to Python's internals."""

    def __init__(*arguments: Any, **named: Any) -> None:  # the first one is self, so ``self`` can also be a key
        self, *items = arguments
        attributes = dict(*items, **named)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with a leading underscore, got {name!r}: rename it")
