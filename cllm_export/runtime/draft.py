"""Fills: what stands in a block where nothing is known yet. Any fill is safe; it changes how many forwards a request
takes, never a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Protocol

from cllm_export.bundle import FILLS, FillName, require_one_of

MAX_LOOKUP_NGRAM = 3
"""Tokens that prompt lookup tries to match, at most: what public implementations use."""


class Fill(Protocol):
    """Guesses for one request. It knows the text so far, which is the prompt until ``accept`` tells it more."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        ...

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        """``count`` tokens to stand after the text and a ``draft`` of what follows it."""
        ...


class PadFill:
    """The pad token, or any one token where a model has none: what the demo checkpoint was tuned with."""

    def __init__(self, token: int) -> None:
        self._token = token

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return [self._token] * count


class RepeatFill:
    """The token before the fill, repeated."""

    def __init__(self, text: Sequence[int]) -> None:
        self._last = text[-1]

    def accept(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1] if tokens else self._last

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return [draft[-1] if draft else self._last] * count


class PromptFill:
    """Random tokens of the prompt (CLLM, arXiv 2403.00835), from a seeded generator: a run can be repeated."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(seed)  # noqa: S311 - a guess, not a secret

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._random.choices(self._prompt, k=count)


class LookupFill:
    """Prompt lookup: what followed the longest n-gram that ends text and draft, where it last stood in the text.

    Where a continuation reaches the end of the text it goes on into the draft and into itself, so that a repetition
    is guessed to go on. Where not even the last token stood in the text before: the pad token.
    """

    def __init__(self, text: Sequence[int], pad: int) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """Position after the last occurrence of an n-gram that has a token after it."""
        self._pad = pad
        self.accept(text)

    def accept(self, tokens: Sequence[int]) -> None:
        text, following = self._text, self._next
        for token in tokens:
            position = len(text)
            for length in range(1, min(MAX_LOOKUP_NGRAM, position) + 1):
                following[tuple(text[position - length :])] = position
            text.append(token)

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        end = [*self._text[-MAX_LOOKUP_NGRAM:], *draft][-MAX_LOOKUP_NGRAM:]
        start = next((at for first in range(len(end)) if (at := self._next.get(tuple(end[first:]))) is not None), None)
        if start is None:
            return [self._pad] * count
        source = [*self._text[start:], *draft]
        return list(islice(cycle(source), count))


def make_fill(name: FillName, *, prompt: Sequence[int], pad_token_id: int, seed: int) -> Fill:
    """The fill of this name for one request.

    Raises:
        OptionError: no such fill.
    """
    require_one_of("fill", name, FILLS)
    if name == "prompt":
        return PromptFill(prompt, seed)
    if name == "lookup":
        return LookupFill(prompt, pad_token_id)
    return RepeatFill(prompt) if name == "repeat" else PadFill(pad_token_id)
