"""What one prompt's decoding went through: its text, and every block that a forward verified. A JSON line on disk.

The stage of convergence of a row follows from the text, so it is known only once the request has ended. A row of a
block sees the draft tokens before it and its own; by their number of right ones it is

    guess      sees draft tokens, and none is the one that the text came to: a first guess
    partial    sees right ones and wrong ones
    fixed      sees right ones alone, or none: what it computes is what it would compute on clean text

A row at or past the end of the text is dead: whatever it gives is cut off. It has no stage, and is not observed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from cllm_export.runtime.decoding.statistics import ForwardRecord

Stage = Literal["guess", "partial", "fixed"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class State(NamedTuple):
    """A block as a forward verified it."""

    write_index: int
    num_committed: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The decode of one prompt."""

    id: str
    prompt: tuple[int, ...]
    new: tuple[int, ...]
    """What it gave: the fixed point of every draft."""
    states: tuple[State, ...]
    """One for each forward, in order: run over the prompt's KV they leave the KV that the decode left."""

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and new tokens."""
        return self.prompt + self.new

    def stages(self, state: State) -> list[Stage | None]:
        """Stage of every row of one of its states; None for a dead one."""
        text, stages, num_right = self.text, list[Stage | None](), 0
        first_draft = state.num_committed
        for row, token in enumerate(state.tokens):
            position = state.write_index + row
            if position >= len(text) - 1:  # it predicts what stands after the end
                stages.append(None)
                continue
            num_seen = row - first_draft + 1
            num_right += num_seen > 0 and token == text[position]
            stages.append("fixed" if num_right >= num_seen else "partial" if num_right else "guess")
        return stages

    def to_json(self) -> str:
        """One line."""
        return json.dumps([self.id, self.prompt, self.new, self.states], separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Recording:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError, TypeError: it is something else.
        """
        name, prompt, new, states = json.loads(line)
        return cls(
            id=name,
            prompt=tuple(prompt),
            new=tuple(new),
            states=tuple(State(start, committed, tuple(tokens)) for start, committed, tokens in states),
        )


def recording_of(name: str, prompt: Sequence[int], forwards: Sequence[ForwardRecord]) -> Recording:
    """What a request of one committed token a block went through, from the records of its forwards."""
    return Recording(
        id=name,
        prompt=tuple(prompt),
        new=tuple(token for record in forwards for token in record.new),
        states=tuple(State(record.write_index, 1, tuple(record.block)) for record in forwards),
    )


def write_recordings(path: Path, recordings: Iterable[Recording]) -> None:
    """Write recordings, one a line."""
    path.write_text("".join(recording.to_json() + "\n" for recording in recordings), encoding="utf-8")


def read_recordings(path: Path) -> Iterator[Recording]:
    """Read recordings one by one.

    Raises:
        ValueError, TypeError: a line is damaged.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Recording.from_json(line)
