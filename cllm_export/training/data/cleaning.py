"""Decides which decoded answers are fit for training, and says why the others are not."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from cllm_export.runtime.decoding.request import FinishReason

REPETITION = "repetition"
TRUNCATED = "cut by the length limit"
EMPTY_ANSWER = "empty answer"

MAX_RUN = 10
"""An answer with this many equal tokens in a row counts as collapsed (CLLM, arXiv 2403.00835)."""


def why_dropped(new_ids: Sequence[int], finish_reason: FinishReason, *, eos_token_ids: Collection[int]) -> str | None:
    """Why an answer is dropped, or None if it is kept: it repeats a token, never ends, or is empty.

    An answer that repeats a token up to the length limit counts as a repetition, because that is the cause.
    """
    if all(token in eos_token_ids for token in new_ids):
        return EMPTY_ANSWER
    if is_repetitive(new_ids):
        return REPETITION
    return TRUNCATED if finish_reason == "length" else None


def is_repetitive(new_ids: Sequence[int]) -> bool:
    """Whether one token occurs ten or more times in a row."""
    return any(len(list(run)) >= MAX_RUN for _, run in itertools.groupby(new_ids))
