"""Sampling as a deterministic function of the text: the noise of each absolute position is fixed.

This keeps Jacobi decoding lossless at every fixed n. If n is chosen at run time (``auto``), logits may round
differently.

The token at position t is the argmax over v of ``score_t(v) / temperature + gumbel(seed, t, v)``, on the support that
top-k, top-p and min-p leave. This is an exact draw from the softmax (the Gumbel-max trick). The draw does not depend on
the forward, the row or the neighbours. "Greedy" becomes "perturbed argmax", and every rule of Jacobi decoding still
holds: the fixed point is the autoregressive sample of that seed. Sources: predictive sampling with forecasting
autoregressive models (arXiv 2002.09928); Philox (Salmon et al. 2011) as the counter-based generator.

Shapes: n tokens of the block, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.constraint import Constraint

Float32Array = NDArray[np.float32]

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
"""The most alternatives that a request may ask for at each token, as in public serving APIs."""

SMALLEST, LARGEST = 1e-6, 1e6
"""Bounds of the repetition penalty, and of a temperature other than 0."""
LARGEST_BIAS = 1e20
"""Bound of a bias that is not a ban. These bounds keep every score within float32: two scores that overflow would
tie."""

TOP_P_HEAD = 256
"""Number of most probable tokens that top-p sorts first. It sorts the whole vocabulary only if they are too few."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The defaults are greedy decoding.

    The order is: logit bias, repetition penalty, grammar, temperature, top-k, top-p (of the tokens that top-k left),
    min-p.

    Raises:
        OptionError: a value is out of range; the message gives its name and range.
    """

    GROUP: ClassVar[OptionGroup] = "Sampling"

    temperature: float | None = option(None, help="Temperature of sampling; at 0 decoding is greedy.", otherwise="0")
    """0, or 1e-6 to 1e6. None is 0 that nobody asked for: ``GenerateOptions`` then refuses what needs a temperature."""
    top_k: int = option(
        0, minimum=0, help="Sample only from this many of the most probable tokens; 0 keeps all tokens."
    )
    """Keeps the k most probable tokens, and tokens that tie with the last of them."""
    top_p: float = option(
        1.0,
        above=0,
        maximum=1,
        help="Sample from the smallest set of tokens whose cumulative probability is at least this.",
    )
    """Keeps the most probable tokens that together reach this probability. Of equal tokens at the border, those with
    the highest ids stay."""
    min_p: float = option(
        0.0,
        minimum=0,
        maximum=1,
        help="Sample only tokens that have at least this fraction of the most probable token's probability.",
    )
    """Keeps tokens at least this fraction as probable as the most probable one."""
    repetition_penalty: float = option(
        1.0,
        minimum=SMALLEST,
        maximum=LARGEST,
        help="Above 1, tokens that are in the text already become less probable.",
    )
    """Divides the positive scores of tokens in the prompt or the text, and multiplies their negative scores."""
    logit_bias: Mapping[int, float] | None = option(
        None, help="Add a bias to the logit of a token, as TOKEN=BIAS; -inf bans it. Repeat the option for several."
    )
    """Token id to bias, -1e20 to 1e20, or ``-inf``, which bans the token."""
    seed: int | None = option(
        None,
        minimum=0,
        help="Seed of sampling and of the prompt proposer.",
        otherwise="a new one for each sampled prompt",
    )
    """Seed of the sampling noise and of the ``prompt`` proposer, 0 to 2^63 - 1. A ``Sampler`` reads None as 0."""

    def __post_init__(self) -> None:
        heat = 0 if self.temperature is None else self.temperature
        if not _is_number(heat) or not (heat == 0 or SMALLEST <= heat <= LARGEST):
            raise OptionError(
                f"temperature must be a number, 0 or {SMALLEST:g} to {LARGEST:g}, got {heat!r}",
                fields=("temperature",),
            )
        check_options(self)
        if self.seed is not None and self.seed > MAX_SEED:
            raise OptionError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed}", fields=("seed",))
        self._check_bias()

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping | None):
            raise OptionError(
                f"logit_bias must map token ids to numbers, got {self.logit_bias!r}", fields=("logit_bias",)
            )
        for token, bias in (self.logit_bias or {}).items():
            if not _is_number(bias) or not (abs(bias) <= LARGEST_BIAS or bias == -math.inf):
                raise OptionError(
                    f"logit_bias of token {token!r} must be a number from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g}, or "
                    f"-inf, got {bias!r}",
                    fields=("logit_bias",),
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the graph's own argmax gives the drawn token, so that no logits are needed."""
        return not self.temperature and self.repetition_penalty == 1 and not self.logit_bias

    def check_tokens(self, vocab_size: int) -> None:
        """Raise OptionError unless every biased token is one of the model's."""
        for token in self.logit_bias or {}:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise OptionError(
                    f"logit_bias takes token ids from 0 to {vocab_size - 1}, got {token!r}", fields=("logit_bias",)
                )


class Logprob(NamedTuple):
    """Log-probabilities at one new token, in the model's own distribution: before bias, penalty and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most probable tokens with their log-probabilities, the best first."""


class Sampler:
    """Draws the tokens of one request from the logits of its blocks. It keeps the text, but no logits.

    Args:
        sampling: how tokens are drawn.
        prompt: token ids.
        vocab_size: V.
        constraint: the grammar of the request, if it has one.
    """

    def __init__(
        self, sampling: Sampling, *, prompt: Sequence[int], vocab_size: int, constraint: Constraint | None = None
    ) -> None:
        sampling.check_tokens(vocab_size)
        self._constraint = constraint
        self._num_prompt = len(prompt)
        self._num_constrained = 0
        """Tokens after the prompt that the grammar knows to be text."""
        self._sampling = sampling
        self._text = list(prompt)
        self._seen = np.zeros(vocab_size, bool)
        self._num_seen = 0
        self._noise: dict[int, Float32Array] = {}
        self._seed = sampling.seed or 0
        self._bias_of = sampling.logit_bias or {}
        self._bias = np.zeros(vocab_size, np.float32) if self._bias_of else None
        if self._bias is not None:
            self._bias[list(self._bias_of)] = list(self._bias_of.values())

    def accept(self, tokens: Sequence[int]) -> None:
        """Append these tokens to the text."""
        self._text += tokens

    def forced(self, write_index: int, limit: int) -> list[int]:
        """The tokens, at most ``limit``, that a grammar forces after the text so far.

        ``draw`` would draw them from any logits. ``write_index`` is that of the next block.

        Raises:
            EngineError: the grammar does not allow the text.
        """
        if not self._constraint or limit < 1:
            return []
        length = self._enter(self._constraint, write_index)
        known = self._text[write_index + 1 :]
        for index, token in enumerate(known, start=length):
            self._constraint.push(index, token)
        forced = self._constraint.forced(length + len(known), limit)
        banned = (index for index, token in enumerate(forced) if self._bias_of.get(token) == -math.inf)
        return forced[: next(banned, len(forced))]

    def _enter(self, constraint: Constraint, write_index: int) -> int:
        """Tell the grammar the text up to ``write_index``, the first token of the block. Returns its length."""
        length = write_index + 1 - self._num_prompt
        for index in range(self._num_constrained, length):
            constraint.push(index, self._text[self._num_prompt + index])
        self._num_constrained = length
        constraint.forget(length)
        return length

    def draw(self, block: Sequence[int], num_committed: int, write_index: int, logits: Float32Array) -> DrawnBlock:
        """Draw the token after each row of a block, and count the accepted rows.

        Args:
            block: tokens [n] of the forward; row i is at position ``write_index + i``.
            num_committed: leading rows known to be right.
            write_index: position of the block's first token.
            logits: float32 [n, V].

        Raises:
            EngineError: logits are NaN.
            GrammarError: the grammar allows no token after the text.
            OptionError: bias and grammar leave no token.
        """
        scores = self._adjusted(block, write_index, logits)
        if self._constraint:
            return self._draw_constrained(self._constraint, block, num_committed, write_index, scores)
        scores = self._drawn(scores, self._noise_of(write_index, len(block)))
        dead = self._first_dead(scores, num_known=len(self._text) - write_index - 1)
        next_ids: list[int] = scores.argmax(axis=-1).tolist()
        right = num_committed
        while right < len(block) and block[right] == next_ids[right - 1]:
            right += 1
        return DrawnBlock(next_ids, min(right, dead))

    def scores(self, block: Sequence[int], write_index: int, logits: Float32Array) -> Float32Array:
        """The scores [n, V] whose argmax is drawn without a grammar: adjusted logits / temperature, filtered, noisy.

        At temperature 0 they are the adjusted logits. Arguments and errors are those of ``draw``.
        """
        return self._drawn(self._adjusted(block, write_index, logits), self._noise_of(write_index, len(block)))

    def _drawn(self, scores: Float32Array, noise: Float32Array | None) -> Float32Array:
        """The scores [n, V] whose argmax is drawn, of adjusted scores and Gumbel noise [n, V]."""
        if noise is None:
            return scores
        scores = scores / np.float32(self._sampling.temperature)
        return np.where(self._support(scores), scores + noise, -np.inf)

    def _draw_constrained(
        self, constraint: Constraint, block: Sequence[int], num_committed: int, write_index: int, scores: Float32Array
    ) -> DrawnBlock:
        """Draw under the grammar, row by row: it reads a token of the block only when that is known to be right.

        The rows after the right ones only give drafts, which the grammar does not see.
        """
        length = self._enter(constraint, write_index)
        num_known = len(self._text) - write_index - 1
        noise = self._noise_of(write_index, len(block))
        next_ids: list[int] = []
        for row in range(len(block)):
            allowed = constraint.state(length + row).allowed
            masked = None if allowed is None else np.where(allowed, scores[row : row + 1], np.float32(-np.inf))
            if masked is None or np.isneginf(masked.max()):
                if row <= num_known:
                    constraint.check(length + row)
                    raise OptionError("logit_bias and grammar leave no token to go on with: allow one at least")
                break
            next_ids += self._drawn(masked, None if noise is None else noise[row : row + 1]).argmax(axis=-1).tolist()
            if row + 1 == len(block) or (row + 1 >= num_committed and block[row + 1] != next_ids[row]):
                break
            if constraint.ends_with(block[row + 1]):
                break
            constraint.push(length + row, block[row + 1])
        right = len(next_ids)
        if right < len(block):
            drafts = self._drawn(scores[right:], None if noise is None else noise[right:])
            next_ids += drafts.argmax(axis=-1).tolist()
        return DrawnBlock(next_ids, right)

    def _adjusted(self, block: Sequence[int], write_index: int, logits: Float32Array) -> Float32Array:
        """Scores [n, V] after bias and penalty. Row i is penalised for the text up to its own token."""
        if np.isnan(logits.max(axis=-1)).any():
            raise EngineError(f"the model's logits are NaN at write index {write_index}: check the checkpoint")
        scores = logits
        if self._bias is not None:
            scores = scores + self._bias
        if self._sampling.repetition_penalty != 1:
            penalty = np.float32(self._sampling.repetition_penalty)
            seen = self._seen_by_row(block, write_index)
            scores = np.where(seen, np.where(scores > 0, scores / penalty, scores * penalty), scores)
        return scores

    def _first_dead(self, scores: Float32Array, *, num_known: int) -> int:
        """The first row that no token may follow, or the number of rows. Neither it nor a later row is accepted.

        Raises:
            OptionError: the row holds a token of the text, at most ``num_known`` rows after the block's first row.
        """
        if self._bias is None:
            return len(scores)
        is_dead = np.isneginf(scores.max(axis=-1))
        dead = int(is_dead.argmax()) if is_dead.any() else len(scores)
        if dead <= num_known:
            raise OptionError("logit_bias and grammar leave no token to go on with: allow one at least")
        return dead

    def _seen_by_row(self, block: Sequence[int], write_index: int) -> NDArray[np.bool_]:
        self._seen[self._text[self._num_seen : write_index + 1]] = True
        self._num_seen = max(self._num_seen, write_index + 1)
        seen = np.repeat(self._seen[None], len(block), axis=0)
        for row in range(1, len(block)):
            seen[row:, block[row]] = True
        return seen

    def _support(self, scores: Float32Array) -> NDArray[np.bool_]:
        """The tokens [n, V] that the filters keep of each row, before the noise.

        Top-p is taken of what top-k left, and min-p comes last, as in transformers.
        """
        sampling, vocab_size = self._sampling, scores.shape[1]
        kept = scores > -np.inf
        if 0 < sampling.top_k < vocab_size:
            kept &= scores >= np.partition(scores, vocab_size - sampling.top_k)[:, vocab_size - sampling.top_k, None]
        if sampling.top_p < 1:
            for row, support in zip(scores, kept, strict=True):
                _keep_nucleus(row, support, sampling.top_p)
        if sampling.min_p:
            kept &= scores >= scores.max(axis=-1, keepdims=True) + np.float32(math.log(sampling.min_p))
        return kept

    def _noise_of(self, write_index: int, block_size: int) -> Float32Array | None:
        """Gumbel noise [n, V] of the tokens that a block's rows predict; None at temperature 0.

        Positions of the last block are reused.
        """
        if not self._sampling.temperature:
            return None
        positions = range(write_index + 1, write_index + 1 + block_size)
        self._noise = {
            position: self._noise[position]
            if position in self._noise
            else gumbel_noise(self._seed, position, len(self._seen))
            for position in positions
        }
        return np.stack([self._noise[position] for position in positions])


class DrawnBlock(NamedTuple):
    """The result of ``Sampler.draw``. It replaces the graph's two outputs for one slot."""

    next_ids: list[int]
    num_accepted: int


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Float32Array:
    """Standard Gumbel noise [V] for the token at an absolute position. It depends only on the arguments.

    Value v is -log(-log(u)). The upper 52 bits of the v-th 64-bit output of Philox4x64-10 give u in (0, 1). The key is
    (seed, position), the counter 0.
    """
    raw = np.random.Philox(key=np.array([seed, position], np.uint64), counter=0).random_raw(vocab_size)
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Float32Array = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def logprobs_of(logits: Float32Array, token: int, count: int) -> Logprob:
    """The log-probabilities of a token and of the ``count`` most probable tokens, under logits [V]."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    best = np.argsort(-values, kind="stable")[:count] if count else np.array([], np.int64)
    return Logprob(token, float(values[token]), tuple((int(index), float(values[index])) for index in best))


def _keep_nucleus(scores: Float32Array, support: NDArray[np.bool_], top_p: float) -> None:
    """Reduce the support [V] of a row to its most probable tokens that together reach ``top_p``.

    Of the tokens that tie at the border those with the highest ids stay, as in transformers.
    """
    candidates = scores[support]
    if not np.isfinite(highest := candidates.max(initial=-np.inf)):  # no token at all, or all probability on infinities
        support &= scores == highest
        return
    total = np.exp(candidates.astype(np.float64) - highest).sum()
    for size in (TOP_P_HEAD, len(candidates)):
        head = candidates if size >= len(candidates) else np.partition(candidates, len(candidates) - size)[-size:]
        head = np.sort(head)[::-1]
        share = np.cumsum(np.exp(head.astype(np.float64) - highest)) / total
        reached = int(np.searchsorted(share, top_p))
        if reached < len(head):
            break
    else:
        return  # by rounding, even the sum of all is slightly below top_p
    num_above = int(np.count_nonzero(head[: reached + 1] > head[reached]))
    tied = np.flatnonzero(support & (scores == head[reached]))
    support &= scores > head[reached]
    support[tied[len(tied) - (reached + 1 - num_above) :]] = True


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
