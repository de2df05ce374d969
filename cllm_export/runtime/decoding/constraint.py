"""Constrained output: which tokens a grammar allows after each row of a block.

The grammar itself is llguidance's (extra ``grammar``). Row i of a block is masked by the state that the text and the
draft d[1..i] reach, so that a draft which breaks the grammar can match nothing, and constrained Jacobi decoding equals
constrained autoregressive decoding token for token at every fixed n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cllm_export.errors import EngineError, MissingExtraError, OptionError
from cllm_export.runtime.decoding.text import TextCodec

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_schema", "regex", "grammar"]


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer.

    Args:
        codec: the model's.
        vocab_size: V of its logits.
        eos_token_ids: what ends a text; allowed where the grammar is complete.

    Raises:
        MissingExtraError: llguidance is not installed.
        OptionError: the model has no end-of-sequence token, or its tokenizer is of no kind that llguidance reads.
    """

    def __init__(self, codec: TextCodec, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise MissingExtraError("llguidance", extra="grammar") from None
        if not eos_token_ids:
            raise OptionError("constrained output needs a model with an end-of-sequence token, to end with")
        self._vocab_size = vocab_size
        try:
            self._tokenizer = llguidance.LLTokenizer(
                codec.tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(eos_token_ids)
            )
        except Exception as error:  # llguidance raises ValueError and its own
            raise OptionError(f"llguidance does not read this model's tokenizer: {error}") from None

    def compile(self, kind: GrammarKind, source: object) -> Constraint:
        """The constraint of one request.

        Args:
            kind: ``json_schema``, ``regex`` or ``grammar``, a Lark grammar as llguidance takes it.
            source: its text; a JSON schema may be a mapping as well.

        Raises:
            OptionError: it is not of its kind, with llguidance's own words.
        """
        import llguidance

        if kind == "json_schema" and isinstance(source, Mapping):
            source = _schema_text(source)
        if not isinstance(source, str) or not source:
            raise OptionError(f"{kind} must be a non-empty text, got {source!r}")
        makers: dict[GrammarKind, Callable[[str], str]] = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "grammar": llguidance.LLMatcher.grammar_from_lark,
        }
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, makers[kind](source))
            problem = matcher.get_error()
        except Exception as error:  # llguidance raises ValueError and its own
            problem = str(error)
        if problem:
            raise OptionError(f"{kind} does not compile: {' '.join(problem.split())}")
        return Constraint(matcher, self._vocab_size)


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"json_schema holds what JSON cannot: {error}") from None


class Constraint:
    """The grammar's state along one request."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._allows_all = np.ones(vocab_size, bool)

    def advance(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens, which the grammar allowed.

        Raises:
            EngineError: it did not.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise EngineError(f"the grammar does not go on with tokens {list(tokens)}: {self._matcher.get_error()}")

    def forced(self, known: Sequence[int], limit: int) -> list[int]:
        """Tokens, up to ``limit``, that must follow the text and ``known`` behind it: each is the only one allowed.

        An end-of-sequence token is never among them: a request ends with a forward's own. Not llguidance's own
        fast-forward tokens: those are the usual tokens of text that is certain, which decoding token by token may
        spell otherwise.

        Raises:
            EngineError: the grammar does not go on with ``known``.
        """
        matcher, forced = self._matcher, list[int]()
        if len(known) and matcher.try_consume_tokens(list(known)) != len(known):
            raise EngineError(f"the grammar does not go on with tokens {list(known)}: {matcher.get_error()}")
        while len(forced) < limit and not matcher.is_stopped():
            allowed = np.flatnonzero(self._mask())
            if len(allowed) != 1 or matcher.try_consume_tokens([int(allowed[0])]) != 1:
                break
            forced.append(int(allowed[0]))
        if num_consumed := len(known) + len(forced):
            matcher.rollback(num_consumed)
        return forced

    def allowed(self, draft: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens may follow the text, and each token of a draft behind it, bool [1 + len(draft), V].

        Behind the first draft token that breaks the grammar nothing can match, so everything is allowed there.
        """
        rows, num_consumed = [self._mask()], 0
        for token in draft:
            if not rows[-1][token] or self._matcher.try_consume_tokens([token]) != 1:
                break
            num_consumed += 1
            rows.append(self._mask())
        if num_consumed:
            self._matcher.rollback(num_consumed)
        rows += [self._allows_all] * (1 + len(draft) - len(rows))
        return np.stack(rows)

    def _mask(self) -> NDArray[np.bool_]:
        packed: Any = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask: NDArray[np.bool_] = np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(bool)
        return mask
