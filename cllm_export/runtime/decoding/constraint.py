"""Constrained output: which tokens a grammar allows after each row of a block.

llguidance (extra ``grammar``) implements the grammars. The grammar's state after the text and the draft d[1..i] masks
row i of a block. So a draft token that breaks the grammar cannot be accepted. Constrained Jacobi decoding therefore
equals constrained autoregressive decoding token for token at every fixed n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cllm_export.errors import EngineError, OptionError
from cllm_export.extras import missing_extra
from cllm_export.runtime.decoding.text import TextCodec

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_schema", "regex", "grammar"]


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer.

    Args:
        codec: the model's codec.
        vocab_size: V of its logits.
        eos_token_ids: the end-of-sequence tokens. They are allowed where the grammar is complete.

    Raises:
        MissingExtraError: llguidance is not installed.
        OptionError: the model has no end-of-sequence token, or llguidance cannot read its tokenizer.
    """

    def __init__(self, codec: TextCodec, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_extra("llguidance", extra="grammar") from None
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
            kind: ``json_schema``, ``regex``, or ``grammar`` for a Lark grammar as llguidance takes it.
            source: its text; a JSON schema may also be a mapping.

        Raises:
            OptionError: ``source`` is not a valid source of this kind. The message holds llguidance's own.
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
    """The state of a grammar during one request."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._allows_all = np.ones(vocab_size, bool)

    def advance(self, tokens: Sequence[int]) -> None:
        """Append these tokens to the text.

        Raises:
            EngineError: the grammar does not allow them.
        """
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            raise EngineError(f"the grammar does not go on with tokens {list(tokens)}: {self._matcher.get_error()}")

    def forced(self, known: Sequence[int], limit: int) -> list[int]:
        """The tokens, at most ``limit``, that must follow the text and ``known``: each is the only one allowed.

        They never include an end-of-sequence token, because only the output of a forward ends a request. llguidance's
        own fast-forward tokens are not used. They are the usual tokens of a certain text, but decoding token by token
        may split that text differently.

        Raises:
            EngineError: the grammar does not allow ``known`` after the text.
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
        """The tokens that may follow the text and each token of a draft after it, bool [1 + len(draft), V].

        The first draft token that breaks the grammar cannot be accepted, so the rows from it on allow everything.
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
