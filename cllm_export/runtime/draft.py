"""Fills: what stands in a block where nothing is known yet. Any fill is safe; it changes how many forwards a request
takes, never a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from cllm_export.bundle import FILLS, FillName, require_one_of


class Fill(Protocol):
    """Guesses ``count`` tokens to stand after ``last``."""

    def __call__(self, count: int, last: int) -> list[int]: ...


class PadFill:
    """The pad token, or any one token where a model has none: what the demo checkpoint was tuned with."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, count: int, last: int) -> list[int]:
        return [self._token] * count


class RepeatFill:
    """The token before the fill, repeated."""

    def __call__(self, count: int, last: int) -> list[int]:
        return [last] * count


class PromptFill:
    """Random tokens of the prompt (CLLM, arXiv 2403.00835), from a seeded generator: a run can be repeated."""

    def __init__(self, prompt: Sequence[int], seed: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(seed)  # noqa: S311 - a guess, not a secret

    def __call__(self, count: int, last: int) -> list[int]:
        return self._random.choices(self._prompt, k=count)


def make_fill(name: FillName, *, prompt: Sequence[int], pad_token_id: int, seed: int) -> Fill:
    """The fill of this name for one request.

    Raises:
        OptionError: no such fill.
    """
    require_one_of("fill", name, FILLS)
    if name == "prompt":
        return PromptFill(prompt, seed)
    return RepeatFill() if name == "repeat" else PadFill(pad_token_id)
