"""Constrained output: which tokens a grammar allows after each token of a text.

llguidance (extra ``grammar``) implements the grammars. Its matchers cannot forget a wrong guess. Their rollback does
not clear a stop, and a copy shares its lexer. So a guess that meets a limit of the parser would spoil the text before
it. Therefore the matcher of a request reads nothing but the text: a mask and a token in turn, as in autoregressive
decoding. So constrained Jacobi decoding equals constrained autoregressive decoding token for token at every fixed n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.errors import EngineError, GrammarError, OptionError
from cllm_export.extras import missing_extra, require_floors
from cllm_export.runtime.decoding.text import TextCodec

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_schema", "regex", "grammar"]


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer.

    The tokenizer may have more tokens than the logits have columns, or fewer. A grammar allows only tokens that both
    have, and the model's own end-of-sequence tokens.

    Args:
        codec: the model's codec.
        vocab_size: V of its logits.
        eos_token_ids: the end-of-sequence tokens. They are allowed where the grammar is complete.

    Raises:
        MissingExtraError: llguidance is not installed.
        OutdatedPackageError: it is older than its floor.
        OptionError: the model has no end-of-sequence token, or llguidance cannot read its tokenizer.
    """

    def __init__(self, codec: TextCodec, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_extra("llguidance", extra="grammar") from None
        require_floors("llguidance", "tokenizers")
        self._vocab_size = vocab_size
        self._eos = sorted(token for token in eos_token_ids if token < vocab_size)
        num_tokens = 1 + max(codec.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        known = [token for token in self._eos if token < num_tokens]
        if not known:
            raise OptionError(
                "constrained output needs a model with an end-of-sequence token that its tokenizer has, to end with"
            )
        try:
            self._tokenizer = llguidance.LLTokenizer(
                codec.tokenizer.to_str(), n_vocab=max(vocab_size, num_tokens), eos_token=known
            )
        except Exception as error:  # llguidance raises ValueError and its own
            raise OptionError(f"llguidance does not read this model's tokenizer: {error}") from None

    def compile(self, kind: GrammarKind, source: object) -> Constraint:
        """The constraint of one request.

        Args:
            kind: ``json_schema``, ``regex``, or ``grammar`` for a Lark grammar as llguidance takes it.
            source: its text; a JSON schema may also be a mapping.

        Raises:
            GrammarError: ``source`` is not a valid source of this kind, or no text matches it. The message holds
                llguidance's own.
            OptionError: ``source`` is no text.
        """
        import llguidance

        if kind == "json_schema" and isinstance(source, Mapping):
            source = _schema_text(source)
        if not isinstance(source, str) or not source:
            raise OptionError(f"{kind} must be a non-empty text, got {source!r}", fields=(kind,))
        makers: dict[GrammarKind, Callable[[str], str]] = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "grammar": llguidance.LLMatcher.grammar_from_lark,
        }
        try:
            grammar = _Grammar(kind, self._tokenizer, makers[kind](source), self._vocab_size, self._eos)
            matcher = grammar.matcher()
            problem = matcher.get_error()
        except Exception as error:  # llguidance raises ValueError and its own
            problem = str(error)
        if problem:
            raise GrammarError(f"{kind} does not compile: {' '.join(problem.split())}", fields=(kind,))
        return Constraint(grammar, matcher)


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"json_schema holds what JSON cannot: {error}", fields=("json_schema",)) from None


class State(NamedTuple):
    """What may follow a text."""

    allowed: NDArray[np.bool_] | None
    """The tokens that may follow, bool [V]; None if none may."""
    problem: str = ""
    """Why no token may follow."""

    @property
    def only(self) -> int | None:
        """The token that must follow, or None if there is a choice."""
        if self.allowed is None:
            return None
        tokens = np.flatnonzero(self.allowed)
        return int(tokens[0]) if len(tokens) == 1 else None


class _Grammar(NamedTuple):
    """A grammar, and what its matchers have in common."""

    kind: GrammarKind
    tokenizer: llguidance.LLTokenizer
    source: str
    vocab_size: int
    eos: list[int]

    def matcher(self) -> llguidance.LLMatcher:
        """A matcher at the beginning of the text, which shares nothing with other matchers of this grammar."""
        import llguidance

        return llguidance.LLMatcher(self.tokenizer, self.source, log_level=0)

    def state(self, matcher: llguidance.LLMatcher) -> State:
        """What may follow the text that this matcher has read."""
        packed: Any = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():  # the mask is then that of a complete text
            return State(None, _first_line(matcher.get_error()))
        allowed = np.unpackbits(packed, count=self.vocab_size, bitorder="little").astype(bool)
        if matcher.is_accepting():
            allowed[self.eos] = True
        else:
            self._keep_last_tokens(allowed, matcher)
        if not allowed.any():
            return State(None, "no token of the model can follow")
        return State(allowed)

    def _keep_last_tokens(self, allowed: NDArray[np.bool_], matcher: llguidance.LLMatcher) -> None:
        """Allow an end-of-sequence token that the grammar names only where it completes the text: it ends the text."""
        for token in self.eos:
            if allowed[token]:
                completed = matcher.deep_copy()
                allowed[token] = completed.consume_token(token) and completed.is_accepting()


def _first_line(problem: str) -> str:
    """llguidance's reason without the dump of its state, which has times in it."""
    reason = problem.partition("\n")[0].strip()
    return "nothing can follow that matches" if reason.startswith("NoExtension") else reason


class Constraint:
    """The grammar of one request, followed along its text.

    A text is the tokens after the prompt, without the end-of-sequence token: no token follows that.

    Raises:
        GrammarError: no text matches the grammar.
    """

    def __init__(self, grammar: _Grammar, matcher: llguidance.LLMatcher) -> None:
        self._grammar = grammar
        self._restart(matcher)
        self.check(0)

    def _restart(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._text: list[int] = []
        self._states: dict[int, State] = {0: self._grammar.state(self._matcher)}
        """By the number of tokens. Those of earlier blocks are dropped."""

    def state(self, length: int) -> State:
        """What may follow the first ``length`` tokens of the text, which were pushed before."""
        return self._states[length]

    def check(self, length: int) -> None:
        """Raise GrammarError if no token may follow the first ``length`` tokens of the text."""
        state, kind = self.state(length), self._grammar.kind
        if state.allowed is not None:
            return
        if not length:
            raise GrammarError(f"{kind} matches no text: {state.problem}; rewrite it", fields=(kind,))
        raise GrammarError(
            f"{kind} leads to a dead end at new token {length + 1}: {state.problem}; rewrite it so that every "
            "beginning of a text can be completed",
            fields=(kind,),
        )

    def push(self, length: int, token: int) -> None:
        """Say that ``token`` follows the first ``length`` tokens of the text.

        ``token`` is the model's own under the grammar. If a longer text was pushed and goes on otherwise, the rest of
        that is forgotten.

        Raises:
            EngineError: the grammar does not allow the token.
        """
        if length < len(self._text):
            if self._text[length] == token:
                return
            self._rewind(length)
        allowed = self._states[length].allowed
        if allowed is None or not allowed[token]:
            raise EngineError(f"{self._grammar.kind} does not go on with {token} as new token {length + 1}")
        self._read(token)

    def _read(self, token: int) -> None:
        self._text.append(token)
        has_read = self._matcher.try_consume_tokens([token]) == 1
        problem = _first_line(self._matcher.get_error()) or f"llguidance does not read token {token}"
        self._states[len(self._text)] = self._grammar.state(self._matcher) if has_read else State(None, problem)

    def _rewind(self, length: int) -> None:
        """Go back to a shorter text, by reading it anew. This happens only where an engine does not repeat itself."""
        text, kept = self._text[:length], self._states
        self._restart(self._grammar.matcher())
        for token in text:
            self._read(token)
        self._states = {at: state for at, state in self._states.items() if at in kept}

    def forget(self, length: int) -> None:
        """Drop the states after fewer than ``length`` tokens."""
        for at in [at for at in self._states if at < length]:
            del self._states[at]

    def forced(self, length: int, limit: int) -> list[int]:
        """The tokens, at most ``limit``, that must follow the first ``length`` tokens: each is the only one allowed.

        They never include an end-of-sequence token, because only the output of a forward ends a request. llguidance's
        own fast-forward tokens are not used. They are the usual tokens of a certain text, but decoding token by token
        may split that text differently.
        """
        forced = list[int]()
        while len(forced) < limit:
            only = self.state(length + len(forced)).only
            if only is None or only in self._grammar.eos:
                break
            self.push(length + len(forced), only)
            forced.append(only)
        return forced

    def ends_with(self, token: int) -> bool:
        """Whether nothing follows this token."""
        return token in self._grammar.eos
