"""One tool in a process of its own that times single forwards on request: what ``peer_forwards.py`` talks to.

Standard library only, because it runs in the environment of every tool. A worker reads its model, says in a line of
JSON what it is, and answers each line on standard input with another:

    time N PAST WARM_UP TIMED     milliseconds of TIMED forwards of N tokens after PAST others, WARM_UP untimed before
    predict N PAST                the greedy token after each of the N

Libraries' own words go to standard error.
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

    def forward(self, block: Sequence[int]) -> float:
        """Seconds of one forward of these tokens after the sequence."""
        ...

    def predictions(self, rows: int) -> list[int]:
        """The greedy token after each token of the last forward, which had so many."""
        ...

    def take_back(self) -> None:
        """Makes the sequence what it was before the last forward."""
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
        request, *numbers = line.split()
        block_size, past, *counts = map(int, numbers)
        if past != past_length:
            tool.read(make_tokens(past))
            past_length = past
        answer = {"time": time_forwards, "predict": predict}[request](tool, make_tokens(block_size), *counts)
        print(json.dumps(answer), file=answers, flush=True)


def time_forwards(tool: Forwards, block: Sequence[int], warm_up: int, timed: int) -> list[float]:
    """Milliseconds of each timed forward."""
    times = []
    for _ in range(warm_up + timed):
        times.append(1e3 * tool.forward(block))
        tool.take_back()
    return times[warm_up:]


def predict(tool: Forwards, block: Sequence[int]) -> list[int]:
    tool.forward(block)
    predictions = tool.predictions(len(block))
    tool.take_back()
    return predictions


def _take_standard_output() -> TextIO:
    """Standard output as it was; from now on whatever else is written there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
