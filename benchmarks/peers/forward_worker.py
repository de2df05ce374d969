"""One tool in a process of its own that times single forwards on request: what ``peer_forwards.py`` talks to.

Standard library and numpy only, because it runs in the environment of every tool. A worker reads its model, says in a
line of JSON what it is, and answers each line on standard input with another:

    time N PAST WARM_UP TIMED     milliseconds of TIMED forwards of N tokens after PAST others, WARM_UP untimed before
    predict N PAST                the greedy token after each of the N
    text TOKEN TOKEN ...          the greedy token after each inner token of a text, and the log-probability of
                                  the tokens after them
    memory                        bytes of the largest resident memory of this process

Libraries' own words go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

TEXT_BLOCK = 32
"""Tokens of a forward that reads a text."""


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

    def logits(self, block: Sequence[int]) -> NDArray[np.float32]:
        """The logits [n, V] of a forward of these tokens after the sequence."""
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
    requests = Requests(tool)
    for line in sys.stdin:
        name, *numbers = line.split()
        answer = getattr(requests, name)(*map(int, numbers))
        print(json.dumps(answer), file=answers, flush=True)


class Requests:
    """What a worker answers, by the first word of the request."""

    def __init__(self, tool: Forwards) -> None:
        self._tool = tool
        self._past: list[int] | None = None

    def time(self, block_size: int, past: int, warm_up: int, timed: int) -> list[float]:
        """Milliseconds of each timed forward."""
        self._read(make_tokens(past))
        return time_forwards(self._tool, make_tokens(block_size), warm_up, timed)

    def predict(self, block_size: int, past: int) -> list[int]:
        self._read(make_tokens(past))
        logits = self._tool.logits(make_tokens(block_size))
        self._tool.take_back()
        return greedy(logits)

    def text(self, *tokens: int) -> tuple[list[int], float]:
        """The text is read from its first token on for every block of it, since a tool has no other way back."""
        predicted, total = [], 0.0
        for start in range(1, len(tokens) - 1, TEXT_BLOCK):
            self._read(list(tokens[:start]))
            block = tokens[start : start + TEXT_BLOCK]
            logits = self._tool.logits(block)
            self._tool.take_back()
            following = tokens[start + 1 : start + 1 + len(block)]
            predicted += greedy(logits[: len(following)])
            total += log_probability(logits[: len(following)], following)
        return predicted, total

    def memory(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _read(self, past: list[int]) -> None:
        if past != self._past:
            self._tool.read(past)
            self._past = past


def greedy(logits: NDArray[Any]) -> list[int]:
    chosen: list[int] = logits.argmax(axis=-1).tolist()
    return chosen


def log_probability(logits: NDArray[Any], tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities of one token after each row."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    normalisers = np.log(np.exp(wide - largest).sum(axis=-1)) + largest[:, 0]
    return float((wide[np.arange(len(tokens)), list(tokens)] - normalisers).sum())


def time_forwards(tool: Forwards, block: Sequence[int], warm_up: int, timed: int) -> list[float]:
    """Milliseconds of each timed forward."""
    times = []
    for _ in range(warm_up + timed):
        times.append(1e3 * tool.forward(block))
        tool.take_back()
    return times[warm_up:]


def _take_standard_output() -> TextIO:
    """Standard output as it was; from now on whatever else is written there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
