"""Chat templates: what writes messages as the text that a model was trained on, rendered as transformers renders it.

A template is code of the checkpoint's. It runs in Jinja's sandbox, and sees messages and special tokens alone.
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
"""What a message may call the reasoning of the assistant; templates read the first."""

_TRIAL = ({"role": "user", "content": "Hello"},)


class ChatTemplate:
    """A compiled template, with the special tokens that it may refer to by name.

    Raises:
        ValueError: the text is no valid template; the message says why, and gives the line where Jinja tells it.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template: Template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # such as the SyntaxError or RecursionError of the Python that Jinja makes of it
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of these messages, up to where the assistant's turn begins.

        Raises:
            PromptError: the template refuses the messages, or fails on them.
        """
        try:
            return self._render(messages)
        except Exception as error:  # a template may fail in any way
            raise PromptError(f"the chat template refuses these messages: {error}") from None

    def fault(self) -> str | None:
        """Why this template cannot render one message of a user; None where it can.

        A template that calls ``raise_exception`` dislikes the message, as where it asks for a system turn first. That
        is no fault: other messages may suit it.
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


class _Refusal(Exception):  # noqa: N818 - what a template says by raise_exception is no error of ours
    """What a template said by ``raise_exception``."""


def _as_templates_read_it(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that have no value, its reasoning under the names that templates read."""
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
    """``{% generation %}`` tells a trainer what the assistant wrote; here its body is rendered as it stands."""

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
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """``dict`` without its attributes, which lead to Python's internals."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        return dict.fromkeys(*keys)


class _Namespace(Namespace):
    """``namespace`` that holds no name of Python's internals."""

    def __init__(*arguments: Any, **named: Any) -> None:  # the first is self, so that ``self`` may be a name too
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
