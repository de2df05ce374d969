"""Finds the code in an answer that may wrap it in Markdown."""

from __future__ import annotations

import re

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def fenced_code(text: str) -> str | None:
    """The content of the first fenced block, or None. A block without a closing fence extends to the end."""
    found = _FENCE.search(text)
    return found.group(1) if found else None
