"""Draft sources (proposers): they guess the tokens of a block that are not known yet.

Any draft is safe: at every fixed n it changes how many forwards a request takes, never a token. If n is chosen at run
time (``auto``), n follows the acceptance of the drafts, among sizes that are bit-equal to n = 1 on the engine.

A ``Proposer`` guesses for one request. Some (lookup, pool, a draft model) may have no guess. ``make_proposer`` always
chains these before a source that can guess any number of tokens. State that requests share is in ``ngram_pool.py`` and
``draft_model.py``.
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
"""The most tokens that prompt lookup tries to match, as in public implementations."""

SourceName = ProposerName | Literal["pool", "model"]
SOURCES: tuple[SourceName, ...] = (*PROPOSERS, "pool", "model")
ALWAYS_KNOW: tuple[SourceName, ...] = ("pad", "repeat", "prompt")
"""Sources that can guess any number of tokens: a chain ends with one of them."""


class DraftRequest:
    """A request to a draft model for ``count`` tokens after ``tokens``. Its answer is put into ``found``."""

    def __init__(self, tokens: list[int], count: int) -> None:
        self.tokens = tokens
        self.count = count
        self.found: list[int] = []


class Proposer(Protocol):
    """Guesses for one request. It starts with the prompt as text, and ``accept`` extends the text."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Append these tokens to the text."""
        ...

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """Learn from a rejected ``draft``, whose first token was wrong.

        The draft began in the place of the text's last token. ``predictions`` holds the model's prediction after each
        token of the draft.
        """
        ...

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        """The request that a draft model must answer before ``propose`` with the same arguments, or None."""
        ...

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        """``count`` tokens to follow the text and ``draft``; fewer if the proposer knows no more."""
        ...


class StatelessProposer:
    """The defaults of most proposers: keep no text, learn nothing from rejected drafts, and ask no draft model."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Do nothing: there is no text to keep."""

    def reject(self, draft: Sequence[int], predictions: Sequence[int]) -> None:
        """Do nothing: there is nothing to learn."""

    def request_draft(self, count: int, draft: Sequence[int]) -> DraftRequest | None:
        return None


class PadProposer(StatelessProposer):
    """Guesses the pad token, or one other token if a model has none. The demo checkpoint was tuned with it."""

    def __init__(self, token: int) -> None:
        self._token = token

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return [self._token] * count


class RepeatProposer(StatelessProposer):
    """Repeats the last known token: the last of the draft, or of the text if the draft is empty."""

    def __init__(self, text: Sequence[int]) -> None:
        self._last = text[-1]

    def accept(self, tokens: Sequence[int]) -> None:
        self._last = tokens[-1] if tokens else self._last

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return [draft[-1] if draft else self._last] * count


class PromptProposer(StatelessProposer):
    """Guesses random tokens of the prompt (CLLM, arXiv 2403.00835). The generator is seeded, so runs are repeatable."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(seed)  # noqa: S311 - a guess, not a secret

    def propose(self, count: int, draft: Sequence[int]) -> list[int]:
        return self._random.choices(self._prompt, k=count)


class LookupProposer(StatelessProposer):
    """Prompt lookup: copies the tokens after the last occurrence of the longest n-gram that ends text and draft.

    A copy that reaches the end of the text continues with the draft and then from its own start. So it guesses that a
    repetition continues. If not even the last token occurred in the text before, it has no guess.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        """For each n-gram with a token after it, the position after its last such occurrence."""
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
    """Guesses token by token what followed the longest known n-gram, in any request that shares the pool."""

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
    """Gives the last answer of a draft model (speculative decoding, arXiv 2211.17192). It runs no forward itself."""

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
    """Asks sources in order until the block is full. Each one continues the guesses of those before it."""

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
    """The sources of a chain such as ``pool+lookup+pad``. ``pad`` is added if no source of ``ALWAYS_KNOW`` ends it.

    Raises:
        OptionError: a source is unknown, is named twice, or follows one of ``ALWAYS_KNOW`` and so is never asked.
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
    """The proposer for one request, from a name or a chain. It always guesses as many tokens as it is asked for.

    Raises:
        OptionError: there is no such proposer, or it needs a pool and there is none.
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
