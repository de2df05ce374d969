"""Draft sources: what stands in a block where nothing is known yet. Any draft is safe; it changes how many forwards a
request takes, never a token.

A ``Fill`` guesses for one request. One that may know nothing (lookup, pool, a draft model) stands in a chain before one
that always knows, and ``make_fill`` gives no other. What is shared by requests lies elsewhere: ``ngram_pool.py``,
``draft_model.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Literal, Protocol

from cllm_export.bundle.manifest import FILLS, FillName
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool

MAX_LOOKUP_NGRAM = 3
"""Tokens that prompt lookup tries to match, at most: what public implementations use."""

SourceName = FillName | Literal["pool", "model"]
SOURCES: tuple[SourceName, ...] = (*FILLS, "pool", "model")
ALWAYS_KNOW: tuple[SourceName, ...] = ("pad", "repeat", "prompt")
"""Sources that can guess any number of tokens: a chain ends with one of them."""


class Wish:
    """Tokens that a draft model is asked to go on from, and how far; ``found`` is its answer, once it has one."""

    def __init__(self, tokens: list[int], count: int) -> None:
        self.tokens = tokens
        self.count = count
        self.found: list[int] = []


class Fill(Protocol):
    """Guesses for one request. It knows the text so far, which is the prompt until ``accept`` tells it more."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        ...

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """A forward had this ``draft`` in the place of the text's last token and of what follows, wrong from its first
        token on; the model predicted these tokens, one after each of it."""
        ...

    def wish(self, count: int, draft: Sequence[int]) -> Wish | None:
        """What a draft model must answer for ``guess`` with the same arguments to know it; None for nothing."""
        ...

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        """``count`` tokens to stand after the text and a ``draft`` of what follows it; fewer where no more is known."""
        ...


class PlainFill:
    """What most fills do of the protocol: they remember no text, and neither rejected drafts nor other models."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """Nothing to learn."""

    def wish(self, count: int, draft: Sequence[int]) -> Wish | None:
        return None


class PadFill(PlainFill):
    """The pad token, or any one token where a model has none: what the demo checkpoint was tuned with."""

    def __init__(self, token: int) -> None:
        self._token = token

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return [self._token] * count


class RepeatFill(PlainFill):
    """The token before the fill, repeated."""

    def __init__(self, text: Sequence[int]) -> None:
        self._last = text[-1]

    def accept(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1] if tokens else self._last

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return [draft[-1] if draft else self._last] * count


class PromptFill(PlainFill):
    """Random tokens of the prompt (CLLM, arXiv 2403.00835), from a seeded generator: a run can be repeated."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(seed)  # noqa: S311 - a guess, not a secret

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._random.choices(self._prompt, k=count)


class LookupFill(PlainFill):
    """Prompt lookup: what followed the longest n-gram that ends text and draft, where it last stood in the text.

    Where a continuation reaches the end of the text it goes on into the draft and into itself, so that a repetition
    is guessed to go on. Where not even the last token stood in the text before it knows nothing.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """Position after the last occurrence of an n-gram that has a token after it."""
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
            return []
        source = [*self._text[start:], *draft]
        return list(islice(cycle(source), count))


class PoolFill(PlainFill):
    """What followed the longest known n-gram in any request that shares the pool, token after token."""

    def __init__(self, pool: NgramPool, text: Sequence[int]) -> None:
        self._pool = pool
        self._end = list(text[-pool.max_key :])

    def accept(self, tokens: Sequence[int]) -> None:
        self._pool.learn([*self._end, *tokens], len(self._end))
        self._end = [*self._end, *tokens][-self._pool.max_key :]

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        self._pool.learn_rejected(self._end, draft, predictions)

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._pool.go_on([*self._end, *draft], count)


class ModelFill(PlainFill):
    """What a draft model said when it was last asked (speculative decoding, arXiv 2211.17192); no forward runs here."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)
        self._wish: Wish | None = None

    def accept(self, tokens: Sequence[int]) -> None:
        self._text += tokens
        self._wish = None

    def wish(self, count: int, draft: Sequence[int]) -> Wish | None:
        self._wish = Wish([*self._text, *draft], count) if count else None
        return self._wish

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        wish = self._wish
        return wish.found[:count] if wish and wish.tokens[len(self._text) :] == list(draft) else []


class ChainFill:
    """Sources in order: each guesses what it knows after the guesses of those before it, until the block is full."""

    def __init__(self, fills: Sequence[Fill]) -> None:
        self._fills = fills

    def accept(self, tokens: Sequence[int]) -> None:
        for fill in self._fills:
            fill.accept(tokens)

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        for fill in self._fills:
            fill.reject(draft, predictions)

    def wish(self, count: int, draft: Sequence[int]) -> Wish | None:
        known = list(draft)
        end = len(known) + count
        for fill in self._fills:
            if wish := fill.wish(end - len(known), known):
                return wish
            known += fill.guess(end - len(known), known)
        return None

    def guess(self, count: int, draft: Sequence[int]) -> list[int]:
        known = list(draft)
        end = len(known) + count
        for fill in self._fills:
            if len(known) < end:
                known += fill.guess(end - len(known), known)
        return known[len(draft) :]


def parse_fill(fill: str) -> tuple[SourceName, ...]:
    """The sources of a chain such as ``pool+lookup+pad``, the one that always knows at its end; pad where none is.

    Raises:
        OptionError: a source is unknown, named twice, or behind one that leaves it nothing.
    """
    names = fill.split("+") if isinstance(fill, str) else [fill]
    known = [source for name in names for source in SOURCES if source == name]
    if len(known) < len(names):
        wrong = next(name for name in names if name not in SOURCES)
        raise OptionError(
            f"fill must be one of {', '.join(SOURCES)}, or several joined by +, got {wrong!r}", fields=("fill",)
        )
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise OptionError(f"fill names {twice} twice: {fill!r}", fields=("fill",))
    if hidden := next((name for name in known[:-1] if name in ALWAYS_KNOW), None):
        raise OptionError(
            f"fill {fill!r}: {hidden} always knows, so what follows it is never asked; put it at the end",
            fields=("fill",),
        )
    return tuple(known) if known[-1] in ALWAYS_KNOW else (*known, "pad")


def make_fill(fill: str, *, prompt: Sequence[int], pad_token_id: int, seed: int, pool: NgramPool | None = None) -> Fill:
    """The fill of this name or chain for one request. It always guesses as many tokens as it is asked for.

    Raises:
        OptionError: no such fill, or it needs a pool and there is none.
    """
    fills = [_make_source(name, prompt, pad_token_id, seed, pool) for name in parse_fill(fill)]
    return fills[0] if len(fills) == 1 else ChainFill(fills)


def _make_source(name: SourceName, prompt: Sequence[int], pad_token_id: int, seed: int, pool: NgramPool | None) -> Fill:
    if name == "pool":
        if pool is None:
            raise OptionError("fill pool needs a pool that requests share, and there is none here: leave it out")
        return PoolFill(pool, prompt)
    if name == "prompt":
        return PromptFill(prompt, seed)
    if name == "lookup":
        return LookupFill(prompt)
    if name == "model":
        return ModelFill(prompt)
    return RepeatFill(prompt) if name == "repeat" else PadFill(pad_token_id)
