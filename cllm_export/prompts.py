"""Prompts: JSON Lines (``prompt`` or ``messages``, optional ``id``, ``answer``), plain text (one a line), or random."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_export.errors import PromptError

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: a text, or chat messages."""

    id: str
    """The id given in the file, else the line number, from 1."""
    content: str | tuple[Message, ...]
    answer: str | None = None


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
    is_json = source.endswith((".jsonl", ".json")) or data.lstrip()[:1] == b"{"
    prompts: list[Prompt] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        text = _decode(line, f"{source}:{number}").rstrip("\r")
        if text.strip():
            prompts.append(_parse_line(text, number, source) if is_json else Prompt(id=str(number), content=text))
    if not prompts:
        raise PromptError(f"{source} holds no prompt")
    return prompts


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


def check_messages(messages: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Check that every chat message has a role and a content, and return the messages unchanged.

    Raises:
        PromptError: there are no messages, or one is not {"role": str, "content": str}.
    """
    if not messages:
        raise PromptError(f"{where}: messages must not be empty")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise PromptError(
                f'{where}: a message must look like {{"role": "user", "content": "..."}}, got {message!r}'
            )
    return tuple(messages)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not valid UTF-8 at byte {error.start}: save the file as UTF-8") from None


def _parse_line(text: str, number: int, source: str) -> Prompt:
    where = f"{source}:{number}"
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(raw, dict):
        raise PromptError(f"{where}: expected an object with prompt or messages, got {type(raw).__name__}")
    given = raw.get("id")
    return Prompt(id=str(number if given is None else given), content=_content(raw, where), answer=_answer(raw))


def _content(raw: dict[str, Any], where: str) -> str | tuple[Message, ...]:
    if isinstance(messages := raw.get("messages"), list):
        return check_messages(messages, where)
    prompt = raw.get("prompt")
    if not isinstance(prompt, str):
        raise PromptError(f"{where}: needs a string `prompt` or a list `messages`; it has {_names(raw)}")
    return prompt


def _answer(raw: dict[str, Any]) -> str | None:
    answer = raw.get("answer")
    return None if answer is None else str(answer)


def _names(raw: Iterable[str]) -> str:
    return ", ".join(sorted(raw)) or "nothing"
