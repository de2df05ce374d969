"""What a request may say beside its prompt, and what a model settles it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from cllm_export.bundle.manifest import TrainedWith
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError, PromptError
from cllm_export.runtime.decoding.constraint import Constraint, GrammarKind
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape
from cllm_export.runtime.decoding.request import (
    LOOKAHEAD,
    Method,
)
from cllm_export.runtime.decoding.sampling import MAX_LOGPROBS, Sampling

BlockSize = int | Literal["auto"]
"""n, or n chosen forward by forward."""


class ModelFacts(Protocol):
    """What a model must be known by besides its engine and codec. A bundle's manifest has it all."""

    @property
    def block_size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def trained_with(self) -> TrainedWith | None: ...


class Options(TypedDict, total=False):
    """What a request may say beside its prompt; None is the same as nothing said.

    Keys:
        max_new_tokens: the length limit, exact; by default whatever still fits into the model's max length.
        method: ``jacobi`` (sliding), ``jacobi-block`` (the paper's), ``speculative`` (every block is what ``fill``
            guesses, none of it the model's own), ``autoregressive`` or ``lookahead``; by default the loop the model was
            trained with, else ``jacobi``, and that one where ``block_size`` says ``auto``. Lookahead is for greedy
            requests, one at a time, of a bundle that has a graph for it.
        block_size: n, 1 to the model's largest, or ``auto``: chosen forward by forward to make most tokens a second,
            1 included; what is learned of the model serves all its later requests. By default ``auto`` for
            ``jacobi``, the model's own for ``jacobi-block``, whose blocks keep their size, and for
            ``speculative``, and 1 for ``autoregressive``. An engine pinned to one shape has one n, and ``auto`` is it.
            At every fixed n tokens are those of autoregressive decoding at that n; ``auto`` may round a near tie
            otherwise on a processor where this was not checked.
        deterministic: n is the model's own (1 for ``autoregressive``) unless a number is given, so that a request runs
            the same forwards again: where it is chosen, a near tie may round to another token at another time.
        window, ngram, guesses: W, N and G of ``lookahead``, which give the size of its block; see ``LookaheadShape``.
        fill: the draft source: ``pad``, ``repeat``, ``prompt``, ``lookup``, ``pool`` (n-grams of the texts and rejected
            drafts of all requests that say so), ``model`` (a draft model's tokens), or several joined by ``+``, asked
            in order: ``pool+lookup``. By default what the model was trained with, else ``pad``; for ``speculative``
            ``model`` where there is one, else ``lookup``; for ``lookahead``, whose window it fills once, ``prompt``.
        seed: of the noise that samples, and of the ``prompt`` fill; by default a fresh one for each sampled request,
            which ``Generation.seed`` tells.
        stop: strings to stop at; the text is cut before the first one.
        ignore_eos: decode on past an end-of-sequence token, up to the limit: for measuring.
        temperature, top_k, top_p, min_p, repetition_penalty, logit_bias: see ``Sampling``; by default greedy.
        json_schema, regex, grammar: what the text must match (extra ``grammar``); one of them at most. ``grammar`` is a
            Lark grammar as llguidance takes it. A text that a limit or a stop string cuts is a beginning of a match.
        forwards_per_sync: k: the loop stays on the device, and the host asks once in k forwards what they gave; the
            text of a stream then comes in steps of that. For greedy requests of a TensorRT engine, one at a time, with
            the method ``jacobi``, a ``block_size`` of the plan's (by default the model's own, never ``auto``) and the
            fill ``pad`` or ``repeat``; whatever else is asked for beside it is refused.
        logprobs: log-probabilities of each new token, and this many of the most probable ones beside it, 0 to 20.
    """

    max_new_tokens: int | None
    method: Method | None
    block_size: int | Literal["auto"] | None
    window: int | None
    ngram: int | None
    guesses: int | None
    deterministic: bool
    fill: str | None
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    forwards_per_sync: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None


PREFIX_CACHE_BYTES = 256 << 20
"""KV that a loaded bundle keeps by default: some ten thousand tokens of a small model, two thousand of one of 7 B."""

READING: Options = {"max_new_tokens": 1, "method": "autoregressive", "ignore_eos": True}
"""Options of a request whose last forward writes the KV of the prompt's last token, and nothing beyond it."""

GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "grammar")

SHAPE = ("window", "ngram", "guesses")

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request in order: every option settled and in range."""

    prompt: list[int]
    method: Method
    block_size: BlockSize
    """n of every forward, or where ``lookahead`` is set, rows of the largest."""
    lookahead: LookaheadShape | None
    """W, N and G where that is the method."""
    fill: str
    sampling: Sampling
    logprobs: int | None
    constraint: Constraint | None
    max_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    forwards_per_sync: int | None
    """Where the loop stays on the device."""


def refuse_beside(what: str, sampling: Sampling, logprobs: int | None, constraint: Constraint | None) -> None:
    """Refuse what none but a loop that asks for logits can do."""
    given = {"sampling": not sampling.is_greedy, "logprobs": logprobs is not None, "a grammar": constraint is not None}
    if asked := next((name for name, is_given in given.items() if is_given), None):
        instead = "choose another method" if what == LOOKAHEAD else "leave one of them out"
        raise OptionError(f"{what} is for greedy requests and excludes {asked}: {instead}")


def settle_stop(stop: Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) and text for text in stop):
        raise OptionError(f"stop must be a list of non-empty strings, got {stop!r}")
    return tuple(stop)


def settle_logprobs(count: int | None) -> int | None:
    if count is not None:
        require_at_least("logprobs", count, 0)
        if count > MAX_LOGPROBS:
            raise OptionError(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {count}")
    return count


def pad_token(facts: ModelFacts) -> int:
    """Any token fills a block safely: the pad token, else an end-of-sequence token, else token 0."""
    if facts.pad_token_id is not None:
        return facts.pad_token_id
    return facts.eos_token_ids[0] if facts.eos_token_ids else 0


def fit(prompt_length: int, max_new_tokens: int | None, max_length: int) -> int:
    room = max_length - prompt_length
    if room < 1:
        raise PromptError(
            f"the prompt has {prompt_length} tokens and this model holds {max_length} in all, "
            "at least one of them new: shorten the prompt or build with a larger --max-length"
        )
    if max_new_tokens is None:
        return room
    require_at_least("max_new_tokens", max_new_tokens, 1)
    if max_new_tokens > room:
        raise PromptError(
            f"{prompt_length} prompt tokens and {max_new_tokens} new ones need {prompt_length + max_new_tokens}, this "
            f"model holds {max_length}: ask for at most {room}, or build with a larger --max-length"
        )
    return max_new_tokens
