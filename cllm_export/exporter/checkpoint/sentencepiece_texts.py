"""Texts on which a converted tokenizer is compared with sentencepiece, some made from the model's own pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from cllm_export.exporter.checkpoint.sentencepiece_convert import SPACE, user_defined
from cllm_export.exporter.checkpoint.sentencepiece_model import NORMAL, SentencePieceModel

FIXED = (
    "",
    " ",
    "Hello world",
    " one space before",
    "   three spaces before",
    "two  spaces,   three    four",
    "space behind ",
    "spaces behind   ",
    "The quick brown fox jumps over the lazy dog; 1234567890 times, for 3.14 EUR.",
    "def fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\nprint(fib(9))\n",
    "class A:\n\tdef __init__(self):\n\t\tself.x = {'a': [1, 2], \"b\": None}  # comment\n",
    "for (int i = 0; i < n; ++i) {\r\n    if (a[i] == '\\0') break;\r\n}\r\n",
    "SELECT name, COUNT(*) FROM city WHERE pop >= 100000 GROUP BY name;",
    '<div class="x">\n  <p>a &amp; b</p>\n</div>',
    '{"key": "value",\n  "list": [true, false, null]}',
    "\n",
    "\n\n\n",
    "\t\ttabs\tbetween\t",
    " \n \n  \n   x",
    "Größe, naïve café, Ελληνικά, Русский язык, עברית, العربية, हिन्दी, ไทย",
    "漢字とひらがな、カタカナ。한국어 텍스트。",
    "🙂 👩‍👩‍👧 🇩🇪 👍🏽 ✓ ∑ ∫ √ ≤ → “quoted” \u2013 dash — … €",
    "e\u0301 n\u0303 a\u030a\u0323 \u1e9b\u0323 ﬁ ﬂ ½ ² ℃ Ⅳ ㍿ \uff46\uff55\uff4c\uff4c ｶﾀｶﾅ",
    "no\u00a0break\u2003em\u200bzero\u200djoiner\ufeffmark\u2028line\u3000wide",
    f"{SPACE}{SPACE}a {SPACE} b",
    "control \x00\x01\x07\x1b\x7f\x80\x9f characters",
    "\U00010348\U0001d11e\U0002070e\ufffd\ue000\U000e0041",
    "<0x0A><0x41> <0xZZ> x<0x41>",
    "https://example.com/a_b-c/?q=1&r=%20#top user@example.com C:\\dir\\file.txt",
)

NUM_PIECES = 8000
"""Pieces, and units that repeat, that are compared at most."""
NUM_MIXED = 2000
"""Texts of random pieces, and of random characters, that are compared besides."""
LONGEST_RUN = 40


def texts_of(model: SentencePieceModel) -> Iterator[str]:
    """The texts to compare. The same model gives the same texts."""
    chance = random.Random(0)  # noqa: S311 - test data, not a secret
    pieces = [piece.piece.replace(SPACE, " ") for piece in model.proto.pieces if piece.type == NORMAL]
    own = [piece.replace(SPACE, " ") for piece in user_defined(model)]
    characters = sorted({character for piece in pieces for character in piece})
    yield from FIXED
    yield from chance.sample(pieces, min(len(pieces), NUM_PIECES))
    yield from _runs(pieces)
    yield from (text for piece in own for text in (piece, f"a{piece}b", f"{piece}{piece} a", f" {piece} "))
    for token in model.added:
        yield from (token, f"a{token}b", f"{token} a {token}  b", f" {token}\n{token}{token}")
    yield from _mixed(chance, [*pieces, *(own or [" "]) * (1 + len(pieces) // 20), "\n", "    "])
    yield from _mixed(chance, [*characters, " ", "\n", "\t", "é", "漢", "🙂"])
    if wide := [text for text in pieces if not text.isascii()]:
        yield from _mixed(chance, wide)


def _runs(pieces: Sequence[str]) -> Iterator[str]:
    """Repeated units. Only where a piece overlaps itself does the order of its merges matter."""
    units = {" ", "\n", "\t", "-", "=", "0"} | {unit for piece in pieces if (unit := _unit(piece)) is not None}
    for unit in sorted(units):
        for times in range(1, LONGEST_RUN + 1):
            run = unit * times
            yield from (run, f"{run}a", f"a{run}", f"x{run}{unit[:1]} return")


def _unit(piece: str) -> str | None:
    """The shortest unit that a piece repeats, perhaps without its end, as ``an`` in ``anana``."""
    for size in range(1, len(piece) // 2 + 1):
        if all(piece[index] == piece[index - size] for index in range(size, len(piece))):
            return piece[:size]
    return None


def _mixed(chance: random.Random, parts: Sequence[str]) -> Iterator[str]:
    for _ in range(NUM_MIXED):
        yield "".join(chance.choice(parts) for _ in range(chance.randrange(1, 16)))
