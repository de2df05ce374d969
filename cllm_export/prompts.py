"""Prompts: chats for a model's template, and prompt files, whose rows have one strict schema.

A prompt file is JSON Lines or plain text, one prompt a line. A row of JSON Lines is an object with:

    prompt                    text, or instead:
    messages                  chat messages for the model's template
    id                        text or an integer, for one row alone; by default the line number
    answer                    text: the right answer, which is trained on or compared with
    kind, tables              for scores: the group of the prompt, and the database of an answer in SQL
    tools, documents, chat_template, chat_template_kwargs, add_generation_prompt, continue_final_message
                              for messages: arguments of the template, see ``Chat``

A key with the value null counts as absent. Every other key or type is refused with the line number.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cllm_export.errors import OptionError, PromptError

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}`` and any other keys that a template reads."""

STDIN = "standard input"


@dataclass(frozen=True)
class Chat:
    """Chat messages, with the arguments of the model's chat template. The arguments are those of transformers.

    Raises:
        PromptError: there are no messages, one is malformed, or an argument has another type.
    """

    messages: Sequence[Message]
    """``content`` is text, a list of parts such as ``{"type": "text", "text": ...}``, or None beside other keys such
    as ``tool_calls``. Kept as plain JSON values: a template gets no other object."""
    _: dataclasses.KW_ONLY
    tools: Sequence[Mapping[str, Any]] | None = None
    """The functions that the model may call, each as JSON schema."""
    documents: Sequence[Mapping[str, Any]] | None = None
    """Documents for retrieval-augmented generation."""
    chat_template: str | None = None
    """Which of the model's named templates to use. By default ``tool_use`` if there are tools, else ``default``."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """More variables of the template, such as ``{"enable_thinking": False}``."""
    add_generation_prompt: bool | None = None
    """Whether the text ends with the start of the assistant's turn. By default it does, unless the final message is
    continued."""
    continue_final_message: bool | str = False
    """Leave the final message open, so that the model goes on with it. A string names its field, by default
    ``content``."""

    def __post_init__(self) -> None:
        _set(self, "messages", check_messages(self.messages, "messages"))
        for name in ("tools", "documents"):
            if (given := getattr(self, name)) is not None:
                if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
                    raise PromptError(f"{name} must be a list of objects, got {_show(given)}", fields=(name,))
                _set(self, name, tuple(self._plain_object(name, entry, "must be a list of objects") for entry in given))
        if self.chat_template_kwargs is not None:
            self._check_kwargs()
        if not isinstance(self.chat_template, str | None):
            self._refuse("chat_template", "must be the name of one of the model's templates")
        if not isinstance(self.add_generation_prompt, bool | None):
            self._refuse("add_generation_prompt", "must be true or false")
        if not isinstance(self.continue_final_message, bool | str):
            self._refuse("continue_final_message", "must be true, false or the name of a field")
        if self.add_generation_prompt and self.continue_final_message:
            raise PromptError(
                "add_generation_prompt and continue_final_message exclude each other: leave one out",
                fields=("add_generation_prompt", "continue_final_message"),
            )

    @property
    def is_prompted(self) -> bool:
        """Whether the text ends with the start of the assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def _check_kwargs(self) -> None:
        given = self._plain_object("chat_template_kwargs", self.chat_template_kwargs, "must be an object")
        if taken := sorted(({"messages"} | set(CHAT_ARGUMENTS)) & given.keys()):
            raise PromptError(
                f"chat_template_kwargs must not hold {taken[0]}: give it beside them",
                fields=("chat_template_kwargs", taken[0]),
            )
        _set(self, "chat_template_kwargs", given)

    def _plain_object(self, name: str, value: Any, what: str) -> dict[str, Any]:
        plain = plain_value(value, name)
        if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
            raise PromptError(f"{name} {what}, got {_show(value)}", fields=(name,))
        return plain

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise PromptError(f"{name} {what}, got {_show(getattr(self, name))}", fields=(name,))


CHAT_ARGUMENTS = tuple(field.name for field in dataclasses.fields(Chat) if field.name != "messages")
"""The names of the arguments of ``Chat`` beside its messages."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: a text, chat messages, or a chat with arguments of the template."""

    id: str
    """The id given in the file, else the line number, from 1."""
    content: str | tuple[Message, ...] | Chat
    answer: str | None = None
    kind: str | None = None
    """The group whose scores are told apart."""
    tables: tuple[Any, ...] | None = None
    """The tables of the database that the answer, in SQL, is for."""


def read_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """Read a prompt file. ``.jsonl`` and ``.json`` are JSON Lines, and so is any file that starts with a brace.

    Raises:
        PromptError: the file is missing, holds no prompt, or has a malformed line; the message names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror}") from None
    return parse_prompts(data, source=str(path), limit=limit)


def parse_prompts(data: bytes, *, source: str, limit: int | None = None) -> list[Prompt]:
    """Parse the bytes of a prompt file; ``source`` names it in errors."""
    data = data.removeprefix(codecs.BOM_UTF8)
    is_json = source.lower().endswith((".jsonl", ".json")) or _starts_with_brace(data)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        text = _decode(line, f"{source}:{number}").removesuffix("\r")
        if text.strip():
            prompt = _parse_row(text, number, source) if is_json else Prompt(id=str(number), content=text)
            first = line_of.setdefault(prompt.id, number)
            if first != number:
                raise PromptError(
                    f"{source}:{number}: the id {_show(prompt.id)} is also that of line {first}: give each row its own "
                    "(a row without an id has its line number)"
                )
            prompts.append(prompt)
    if not prompts:
        raise PromptError(f'{source} holds no prompt: write one a line, as text or as JSON like {{"prompt": "..."}}')
    return prompts


def parse_stdin(data: bytes, *, limit: int | None = None) -> list[Prompt]:
    """Parse standard input: JSON Lines if it starts with a brace, else one prompt without its final newline.

    Raises:
        PromptError: it is empty or malformed.
        OptionError: there is a limit, and one prompt.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    if _starts_with_brace(data):
        return parse_prompts(data, source=STDIN, limit=limit)
    if limit is not None:
        raise OptionError("limit is for several prompts; leave it out", fields=("limit",))
    text = _decode(data, STDIN).removesuffix("\n").removesuffix("\r")
    if not text:
        raise PromptError(
            f"{STDIN} is empty, so the prompt is empty: send text or JSON Lines, or give a prompt as an argument"
        )
    return [Prompt(id="1", content=text)]


def random_prompts(count: int, *, vocab_size: int, max_length: int, seed: int = 0) -> dict[str, list[int]]:
    """Sequences of random tokens by name, used if no prompts are given.

    Args:
        vocab_size: exclusive upper bound of the token ids.
        max_length: tokens that the model holds. A prompt has at most 160 tokens, and at most half of ``max_length``,
            so that some prompts are read in several chunks.
    """
    generator = random.Random(seed)  # noqa: S311 - test data, not a secret
    longest = max(1, min(160, max_length // 2))
    lengths = [generator.randint(1, longest) for _ in range(count)]
    return {
        f"random-{index}": [generator.randrange(vocab_size) for _ in range(length)]
        for index, length in enumerate(lengths)
    }


def is_message(value: object) -> bool:
    """Whether a value can be a chat message: a mapping, a dataclass, or an object of pydantic."""
    return isinstance(value, Mapping) or _is_record(value)


def as_chat(prompt: Sequence[Message] | Chat, arguments: Mapping[str, Any] | None = None) -> Chat:
    """The chat of these messages, with these arguments of ``Chat``. They replace those that the chat has.

    Raises:
        PromptError: a message or an argument is malformed.
    """
    if isinstance(prompt, Chat):
        return dataclasses.replace(prompt, **arguments) if arguments else prompt
    return Chat(prompt, **(arguments or {}))


def split_chat_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into the arguments of ``Chat`` and all others. An argument of None is left out."""
    arguments = {name: given[name] for name in CHAT_ARGUMENTS if given.get(name) is not None}
    return arguments, {name: value for name, value in given.items() if name not in CHAT_ARGUMENTS}


def check_messages(messages: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Check that every chat message has a role and something to say. Returns the messages as plain JSON values.

    Raises:
        PromptError: there are no messages, or one is malformed.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"{where}: messages must be a list of objects, got {_show(messages)}")
    if not messages:
        raise PromptError(f"{where}: messages must not be empty")
    return tuple(_check_message(message, where) for message in messages)


def plain_value(value: Any, where: str) -> Any:
    """A JSON value without other objects in it, whose methods a template could call.

    Subclasses of text and numbers lose their class. Scalars of numpy, dataclasses and objects of pydantic become the
    JSON values that they stand for.

    Raises:
        PromptError: the value holds an object that no JSON value stands for, or is nested too deep.
    """
    try:
        return _plain(value, where)
    except RecursionError:
        raise PromptError(f"{where}: nested too deep") from None


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, strip in _SCALARS:
        if isinstance(value, kind):
            return strip(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy
        return _plain(value.item(), where)
    if _is_record(value):
        return _plain(_fields_of(value), where)
    raise PromptError(f"{where}: {_show(value)} is no JSON value: give text, numbers, lists and objects")


_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)
"""JSON's scalars, and how a value of a subclass loses its class."""


def _is_record(value: object) -> bool:
    is_instance = not isinstance(value, type)
    return is_instance and (dataclasses.is_dataclass(value) or callable(getattr(value, "model_dump", None)))


def _fields_of(record: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(record):
        return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    dumped: Mapping[str, Any] = record.model_dump()
    return dumped


def _check_message(message: Any, where: str) -> Message:
    plain = plain_value(message, where) if is_message(message) else None
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str) or not _has_content(plain):
        raise PromptError(
            f'{where}: a message must look like {{"role": "user", "content": "..."}}, got {_show(message)}'
        )
    return plain


def _has_content(message: Mapping[str, Any]) -> bool:
    """Whether the content is text or a list of parts. If there is none, another key, as ``tool_calls``, must be."""
    content = message.get("content")
    if content is None:
        return any(value is not None for key, value in message.items() if key != "role")
    return isinstance(content, str) or (
        isinstance(content, list | tuple) and all(isinstance(part, dict) for part in content)
    )


def _set(chat: Chat, name: str, value: object) -> None:
    object.__setattr__(chat, name, value)  # the class is frozen


def _starts_with_brace(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not valid UTF-8 at byte {error.start}: save the file as UTF-8") from None


def _parse_row(text: str, number: int, source: str) -> Prompt:
    where = f"{source}:{number}"
    try:
        row = _JSON.decode(text.strip())
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: malformed JSON: {error}; each line must hold one whole object") from None
    if not isinstance(row, dict):
        raise PromptError(
            f"{where}: expected an object with prompt or messages, got {type(row).__name__}; each line must hold one "
            "whole object"
        )
    row = {key: value for key, value in row.items() if value is not None or key not in _KEYS}
    _check_row(row, text, where)
    given = row.get("id")
    tables = row.get("tables")
    return Prompt(
        id=str(number if given is None else given),
        content=_content(row, where),
        answer=row.get("answer"),
        kind=row.get("kind"),
        tables=None if tables is None else tuple(tables),
    )


def _check_row(row: dict[str, Any], text: str, where: str) -> None:
    if not {"prompt", "messages"} & row.keys():
        raise PromptError(f"{where}: needs a string `prompt` or a list `messages`; it has {_names(row)}")
    for key, value in row.items():
        if key not in _KEYS:
            raise PromptError(
                f"{where}: unknown key {_show(key)}: a row has {', '.join(_KEYS)}; other variables of the chat "
                "template stand in chat_template_kwargs"
            )
        if key in _TYPES and type(value) not in _TYPES[key][0]:
            raise PromptError(f"{where}: `{key}` must be {_TYPES[key][1]}, got {_show(value)}")
        if "\\u" in text and (at := _half_character(value)) is not None:
            raise PromptError(f"{where}: `{key}` is not valid Unicode: it holds {at}, half of a surrogate pair")
    if {"prompt", "messages"} <= row.keys():
        raise PromptError(f"{where}: has both `prompt` and `messages`: leave one out")


def _content(row: dict[str, Any], where: str) -> str | tuple[Message, ...] | Chat:
    arguments, _ = split_chat_arguments(row)
    if "prompt" in row:
        if arguments:
            raise PromptError(f"{where}: `{next(iter(arguments))}` is for `messages`, and the row has a `prompt`")
        text: str = row["prompt"]
        return text
    messages = check_messages(row["messages"], where)
    try:
        return Chat(messages, **arguments) if arguments else messages
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from None


def _half_character(value: Any) -> str | None:
    """The first half of a surrogate pair in a JSON value, as JSON escapes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_show(twice)} stands twice in one object")
    return made


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON, or too large")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_number)


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "text"),
    "messages": ((list,), "a list of messages"),
    "id": ((str, int), "text or an integer"),
    "answer": ((str,), "text"),
    "kind": ((str,), "text"),
    "tables": ((list,), "a list of tables"),
}
"""Key of a row -> its types, and what they are. ``Chat`` checks its own arguments."""
_KEYS = (*_TYPES, *CHAT_ARGUMENTS)


def _show(value: object) -> str:
    """A value for an error, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(raw: Iterable[str]) -> str:
    """The keys of a row for an error: at most nine, as text that can be printed."""
    names = [name.encode("utf-8", "backslashreplace").decode() for name in sorted(raw)]
    return ", ".join([*names[:9], *(["..."] if len(names) > 9 else [])]) or "nothing"
