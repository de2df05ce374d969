"""Models on given text, teacher-forced: which tokens they predict, and how well they predict the text.

This needs no answers. The share of equal predictions of two models is their agreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.quantization import Agreement
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine, as_batch
from cllm_export.runtime.general_text import Passage

CHUNK = 32
"""Tokens of a forward, if the engine does not fix their number."""
WINDOW = 512
"""Most tokens of general text that are read as one text."""
MOST_WINDOWS = 8
KNOWN_PERPLEXITY = 100.0
"""A model whose perplexity on a text is above this one does not know such text, and what it predicts there is no
evidence. Pre-trained models of a hundred million parameters have about 10 on general text. A model that was tuned from
nothing for one task has thousands."""
MOST_PERPLEXITY = 1e30
"""A larger perplexity counts as this one, so that it is a finite number."""


class ForcedText(NamedTuple):
    """The tokens of a text. Those from index ``first`` on are to be predicted."""

    tokens: tuple[int, ...]
    first: int = 1


class Reading(NamedTuple):
    """What a model predicts on a text, row by row."""

    predicted: tuple[int, ...]
    """The most likely token at the place of each token that is to be predicted."""
    log_probability: float
    """Sum over the tokens that are to be predicted."""


def general_texts(codec: TextCodec, passages: Sequence[Passage], *, max_length: int) -> list[ForcedText]:
    """Passages as tokens, in windows that a model of this length can read. The first window of each comes first.

    Raises:
        OptionError: the passages have fewer than two tokens.
    """
    windows = [list(_windows(codec, passage.text, min(WINDOW, max_length))) for passage in passages]
    in_turn = (window for window in chain.from_iterable(zip_longest(*windows)) if window is not None)
    texts = list(islice(in_turn, MOST_WINDOWS))
    if not texts:
        raise OptionError("text has fewer than two tokens: give a longer one", fields=("text",))
    return texts


def _windows(codec: TextCodec, text: str, size: int) -> Iterator[ForcedText]:
    """Each window begins with the special token that the tokenizer puts before a text, if there is one."""
    body, whole = codec.encode_continuation(text), codec.encode(text)
    start = whole[:1] if whole[:1] != body[:1] else []
    step = max(1, size - len(start))
    for index in range(0, len(body), step):
        tokens = (*start, *body[index : index + step])
        if len(tokens) > 1:
            yield ForcedText(tokens)


def read_texts(
    engine: Engine, texts: Sequence[ForcedText], pad: int, progress: Callable[[int], None] | None = None
) -> list[Reading]:
    """Read every text, in slot 0 of the engine.

    Args:
        progress: receives the number of texts that were read.
    """
    readings = []
    for index, text in enumerate(texts):
        readings.append(_read(engine, text, pad))
        if progress:
            progress(index + 1)
    return readings


def perplexity(readings: Iterable[Reading]) -> float:
    """exp of the mean negative log-probability of every token that is to be predicted."""
    readings = list(readings)
    total = sum(each.log_probability for each in readings)
    return _perplexity(total / sum(len(each.predicted) for each in readings))


def perplexity_of(logits: NDArray[np.float32], following: Sequence[int]) -> float:
    """exp of the mean negative log-probability of one token after each row of logits [m, V]."""
    return _perplexity(float(_log_probabilities(logits, following).mean()))


def _perplexity(mean: float) -> float:
    """The perplexity of a mean log-probability, as a finite number."""
    return math.exp(min(-mean, math.log(MOST_PERPLEXITY)))


def agreement(before: Sequence[Reading], after: Sequence[Reading]) -> Agreement:
    """The agreement of two models on the same texts."""
    pairs = [pair for ours, theirs in zip(before, after, strict=True) for pair in zip(ours[0], theirs[0], strict=True)]
    return Agreement(equal=sum(first == second for first, second in pairs), of=len(pairs))


def _read(engine: Engine, text: ForcedText, pad: int) -> Reading:
    predicted: list[int] = []
    total = 0.0
    for logits, following in _predicting_rows(engine, text, pad):
        predicted += logits.argmax(axis=-1).tolist()
        total += float(_log_probabilities(logits, following).sum())
    return Reading(tuple(predicted), total)


def _predicting_rows(engine: Engine, text: ForcedText, pad: int) -> Iterator[tuple[NDArray[np.float32], Sequence[int]]]:
    """Logits [m, V] of rows that predict tokens, and these tokens."""
    tokens = text.tokens
    fixed = engine.fixed_shapes
    size = fixed.block_size if fixed else min(CHUNK, engine.geometry.max_block_size)
    for start in range(0, len(tokens) - 1, size):
        block = tokens[start : start + size]
        padding = (pad,) * (size - len(block)) if fixed else ()
        forward = engine.forward(as_batch(engine, (*block, *padding), len(block), start), with_logits=True)
        assert forward.logits is not None
        skipped = max(0, text.first - 1 - start)
        following = tokens[start + skipped + 1 : start + len(block) + 1]
        if following:
            yield forward.logits[0][skipped : skipped + len(following)], following


def _log_probabilities(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(wide - largest).sum(axis=-1)) + largest[:, 0]
    chosen: NDArray[np.float64] = wide[np.arange(len(tokens)), list(tokens)] - normaliser
    return chosen
