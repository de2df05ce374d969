"""One tool in a process of its own that times single forwards on request: what ``peer_forwards.py`` talks to.

Standard library only, because it runs in the environment of every tool. A worker reads its model, then answers each
line ``N PAST WARM_UP TIMED`` on standard input with one JSON line: the milliseconds of TIMED forwards of N tokens after
PAST others, WARM_UP untimed ones before them. A first line says what it is. Libraries' own words go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TextIO


class Forwards(Protocol):
    """A tool with its model loaded and one sequence."""

    facts: dict[str, str]
    """What a figure depends on besides the model: version, settings."""

    def read(self, past: Sequence[int]) -> None:
        """Makes these tokens the whole sequence."""
        ...

    def run(self, block: Sequence[int]) -> float:
        """Seconds of one forward of these tokens after the sequence, which is then what it was before."""
        ...


def make_tokens(count: int) -> list[int]:
    """Tokens alike for every tool; what they are is of no account to a forward's time."""
    return [3 + index % 97 for index in range(count)]


def serve(load: Callable[[Path, int, int], Forwards], description: str) -> None:
    """Loads a tool by model, threads and context length, and answers until standard input ends."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context-length", type=int, required=True)
    args = parser.parse_args()
    answers = _take_standard_output()
    tool = load(args.model, args.threads, args.context_length)
    print(json.dumps(tool.facts), file=answers, flush=True)
    past_length = None
    for line in sys.stdin:
        block_size, past, warm_up, timed = map(int, line.split())
        if past != past_length:
            tool.read(make_tokens(past))
            past_length = past
        block = make_tokens(block_size)
        for _ in range(warm_up):
            tool.run(block)
        print(json.dumps([1e3 * tool.run(block) for _ in range(timed)]), file=answers, flush=True)


def _take_standard_output() -> TextIO:
    """Standard output as it was; from now on whatever else is written there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
