"""Chat templates: they write messages as the text that a model was trained on, as transformers renders it.

A template is code from the checkpoint. It runs in Jinja's sandbox, and sees only messages and special tokens.
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

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The keys that a message may use for the reasoning of the assistant. Templates get it under the first two."""

_TRIAL = ({"role": "user", "content": "Hello"},)


class ChatTemplate:
    """A compiled template, with the special tokens that it may refer to by name.

    Raises:
        ValueError: the text is no valid template. The message says why, with the line if Jinja gives it.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template: Template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # such as SyntaxError or RecursionError from the Python code that Jinja makes
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of these messages, up to the start of the assistant's turn.

        Raises:
            PromptError: the template refuses the messages, or fails on them.
        """
        try:
            return self._render(messages)
        except Exception as error:  # a template may fail in any way
            raise PromptError(f"the chat template refuses these messages: {error}") from None

    def fault(self) -> str | None:
        """The reason why this template cannot render one user message; None if it can.

        A template that calls ``raise_exception`` is not at fault. It refuses this message, for example because it
        requires a system turn first, but it may render others.
        """
        try:
            self._render(_TRIAL).encode("utf-8")
        except _Refusal:
            return None
        except Exception as error:  # a template may fail in any way
            return f"it fails on a message of a user: {type(error).__name__}: {error}"
        return None

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        variables = {"tools": None, "documents": None, **self._special_tokens}
        return self._template.render(
            messages=[_as_templates_read_it(message) for message in messages], add_generation_prompt=True, **variables
        )


class _Refusal(Exception):  # noqa: N818 - a refusal by the template is no error of this package
    """A template called ``raise_exception``."""


def _as_templates_read_it(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without keys whose value is None, and with its reasoning under the keys that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[field] for field in REASONING_FIELDS if field in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


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
