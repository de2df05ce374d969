"""Sizes as a user writes them."""

from __future__ import annotations

import re

from cllm_export.errors import OptionError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_size(text: str, *, name: str) -> int:
    """Parse a size such as 512MB, 1GB or 1GiB into bytes. ``name`` is the option's name.

    Raises:
        OptionError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None:
        raise OptionError(f"{name} must be a size such as 512MB or 1GB, got {text!r}", fields=(name,))
    return int(float(match[1]) * UNITS[match[2] or ""])
