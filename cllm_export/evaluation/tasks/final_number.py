"""Finds the final number in an answer to a word problem."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"(?<![\w.])[-\u2212]?\s?[$\u20ac\u00a3]?\s?[-\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_ANY = re.compile(_NUMBER)
_MARKED = (
    re.compile(rf"####\s*({_NUMBER})"),
    re.compile(rf"\\boxed\{{\s*\\?({_NUMBER})"),
    re.compile(rf"(?:answer|result)\s*(?:is|:|=)\s*:?\s*\**\s*\\?({_NUMBER})", re.IGNORECASE),
)
"""Patterns that mark an answer, the most reliable first."""


def final_number(text: str) -> Decimal | None:
    """The number after ``####``, in ``\\boxed{}`` or after "the answer is", else the last one; None if there is none.

    A minus sign is part of a number. Thousands separators, currency signs and a full stop after it are not.
    """
    for mark in _MARKED:
        if found := mark.findall(text):
            return _value(found[0] if mark is _MARKED[0] else found[-1])
    numbers = _ANY.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> Decimal:
    digits = re.sub(r"[^\d.]", "", text)
    return -Decimal(digits) if "-" in text or "\u2212" in text else Decimal(digits)
