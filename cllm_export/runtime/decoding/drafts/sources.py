"""Draft sources: what stands in a block where nothing is known yet. Any draft is safe: at every fixed n it changes how
many forwards a request takes, never a token. Where n is chosen (``auto``), it follows what drafts are worth, and a near
tie may round otherwise on a processor where this was not checked.

A ``Proposer`` guesses for one request. One that may know nothing (lookup, pool, a draft model) stands in a chain before
one that always knows, and ``make_proposer`` gives no other. What is shared by requests lies elsewhere:
``ngram_pool.py``, ``draft_model.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Literal, Protocol

from cllm_export.bundle.manifest import PROPOSERS, ProposerName
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool

MAX_LOOKUP_NGRAM = 3
"""Tokens that prompt lookup tries to match, at most: what public implementations use."""

SourceName = ProposerName | Literal["pool", "model"]
SOURCES: tuple[SourceName, ...] = (*PROPOSERS, "pool", "model")
ALWAYS_KNOW: tuple[SourceName, ...] = ("pad", "repeat", "prompt")
"""Sources that can guess any number of tokens: a chain ends with one of them."""


class DraftRequest:
    """Tokens that a draft model is asked to go on from, and how far; ``found`` is its answer, once it has one."""

    def __init__(self, tokens: list[int], count: int) -> None:
        self.tokens = tokens
        self.count = count
        self.found: list[int] = []


class Proposer(Protocol):
    """Guesses for one request. It knows the text so far, which is the prompt until ``accept`` tells it more."""

    def accept(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        ...

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """A forward had this ``draft`` in the place of the text's last token and of what follows, wrong from its first
        token on; the model predicted these tokens, one after each of it."""
        ...

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        """What a draft model must answer for ``propose`` with the same arguments to know it; None for nothing."""
        ...

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        """``count`` tokens to stand after the text and a ``draft`` of what follows it; fewer where no more is known."""
        ...


class StatelessProposer:
    """What most proposers do of the protocol: they remember no text, and neither rejected drafts nor other models."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """Nothing to learn."""

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        return None


class PadProposer(StatelessProposer):
    """The pad token, or any one token where a model has none: what the demo checkpoint was tuned with."""

    def __init__(self, token: int) -> None:
        self._token = token

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return [self._token] * count


class RepeatProposer(StatelessProposer):
    """The token before the draft, repeated."""

    def __init__(self, text: Sequence[int]) -> None:
        self._last = text[-1]

    def accept(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1] if tokens else self._last

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return [draft[-1] if draft else self._last] * count


class PromptProposer(StatelessProposer):
    """Random tokens of the prompt (CLLM, arXiv 2403.00835), from a seeded generator: a run can be repeated."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(seed)  # noqa: S311 - a guess, not a secret

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._random.choices(self._prompt, k=count)


class LookupProposer(StatelessProposer):
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

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        end = [*self._text[-MAX_LOOKUP_NGRAM:], *draft][-MAX_LOOKUP_NGRAM:]
        start = next((at for first in range(len(end)) if (at := self._next.get(tuple(end[first:]))) is not None), None)
        if start is None:
            return []
        source = [*self._text[start:], *draft]
        return list(islice(cycle(source), count))


class PoolProposer(StatelessProposer):
    """What followed the longest known n-gram in any request that shares the pool, token after token."""

    def __init__(self, pool: NgramPool, text: Sequence[int]) -> None:
        self._pool = pool
        self._end = list(text[-pool.max_key :])

    def accept(self, tokens: Sequence[int]) -> None:
        self._pool.learn([*self._end, *tokens], len(self._end))
        self._end = [*self._end, *tokens][-self._pool.max_key :]

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        self._pool.learn_rejected(self._end, draft, predictions)

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._pool.go_on([*self._end, *draft], count)


class DraftModelProposer(StatelessProposer):
    """What a draft model said when it was last asked (speculative decoding, arXiv 2211.17192); no forward runs here."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)
        self._wish: DraftRequest | None = None

    def accept(self, tokens: Sequence[int]) -> None:
        self._text += tokens
        self._wish = None

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        self._wish = DraftRequest([*self._text, *draft], count) if count else None
        return self._wish

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        request_draft = self._wish
        return (
            request_draft.found[:count]
            if request_draft and request_draft.tokens[len(self._text) :] == list(draft)
            else []
        )


class ChainedProposer:
    """Sources in order: each guesses what it knows after the guesses of those before it, until the block is full."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self._proposers = proposers

    def accept(self, tokens: Sequence[int]) -> None:
        for proposer in self._proposers:
            proposer.accept(tokens)

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        for proposer in self._proposers:
            proposer.reject(draft, predictions)

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        known = list(draft)
        end = len(known) + count
        for proposer in self._proposers:
            if request_draft := proposer.request_draft(end - len(known), known):
                return request_draft
            known += proposer.propose(end - len(known), known)
        return None

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        known = list(draft)
        end = len(known) + count
        for proposer in self._proposers:
            if len(known) < end:
                known += proposer.propose(end - len(known), known)
        return known[len(draft) :]


def parse_proposers(proposer: str) -> tuple[SourceName, ...]:
    """The sources of a chain such as ``pool+lookup+pad``, the one that always knows at its end; pad where none is.

    Raises:
        OptionError: a source is unknown, named twice, or behind one that leaves it nothing.
    """
    names = proposer.split("+") if isinstance(proposer, str) else [proposer]
    known = [source for name in names for source in SOURCES if source == name]
    if len(known) < len(names):
        wrong = next(name for name in names if name not in SOURCES)
        raise OptionError(
            f"proposer must be one of {', '.join(SOURCES)}, or several joined by +, got {wrong!r}", fields=("proposer",)
        )
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise OptionError(f"proposer names {twice} twice: {proposer!r}", fields=("proposer",))
    if hidden := next((name for name in known[:-1] if name in ALWAYS_KNOW), None):
        raise OptionError(
            f"proposer {proposer!r}: {hidden} always knows, so what follows it is never asked; put it at the end",
            fields=("proposer",),
        )
    return tuple(known) if known[-1] in ALWAYS_KNOW else (*known, "pad")


def make_proposer(
    proposer: str, *, prompt: Sequence[int], pad_token_id: int, seed: int, pool: NgramPool | None = None
) -> Proposer:
    """The proposer of this name or chain for one request. It always guesses as many tokens as it is asked for.

    Raises:
        OptionError: no such proposer, or it needs a pool and there is none.
    """
    proposers = [_make_source(name, prompt, pad_token_id, seed, pool) for name in parse_proposers(proposer)]
    return proposers[0] if len(proposers) == 1 else ChainedProposer(proposers)


def _make_source(
    name: SourceName, prompt: Sequence[int], pad_token_id: int, seed: int, pool: NgramPool | None
) -> Proposer:
    if name == "pool":
        if pool is None:
            raise OptionError("proposer pool needs a pool that requests share, and there is none here: leave it out")
        return PoolProposer(pool, prompt)
    if name == "prompt":
        return PromptProposer(prompt, seed)
    if name == "lookup":
        return LookupProposer(prompt)
    if name == "model":
        return DraftModelProposer(prompt)
    return RepeatProposer(prompt) if name == "repeat" else PadProposer(pad_token_id)
