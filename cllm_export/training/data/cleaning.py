"""Which decoded answers are worth training on, and why the others are not."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from cllm_export.runtime.decoding.request import FinishReason

REPETITION = "repetition"
TRUNCATED = "cut by the length limit"
EMPTY_ANSWER = "empty answer"

MAX_RUN = 10
"""Equal tokens in a row from which an answer counts as collapsed (CLLM, arXiv 2403.00835)."""


def why_dropped(new_ids: Sequence[int], finish_reason: FinishReason, *, eos_token_ids: Collection[int]) -> str | None:
    """Why an answer is no sample, or None: it repeats a token, never ends, or says nothing.

    An answer that repeats itself up to the limit is a repetition: that is what went wrong.
    """
    if all(token in eos_token_ids for token in new_ids):
        return EMPTY_ANSWER
    if is_repetitive(new_ids):
        return REPETITION
    return TRUNCATED if finish_reason == "length" else None


def is_repetitive(new_ids: Sequence[int]) -> bool:
    """Whether one token stands ten times in a row or more."""
    return any(len(list(run)) >= MAX_RUN for _, run in itertools.groupby(new_ids))
