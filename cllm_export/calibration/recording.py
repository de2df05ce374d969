"""The recording of one prompt's decode: its text, and every block that a forward verified. On disk it is a JSON line.

The stage of convergence of a row follows from the final text, so it is known only after the request has ended. A row
of a block sees the draft tokens up to its own. A draft token is right if it equals the token of the final text:

    guess      the row sees draft tokens, and none is right: a first guess
    partial    the row sees right and wrong draft tokens
    fixed      the row sees only right draft tokens, or none: it computes the same as on clean text

A row at or past the last token of the text is dead: its prediction is cut off. It has no stage and is not observed.
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
    """A block that a forward verified."""

    write_index: int
    num_committed: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The decode of one prompt."""

    id: str
    prompt: tuple[int, ...]
    new: tuple[int, ...]
    """The new tokens: the fixed point of every draft."""
    states: tuple[State, ...]
    """One state per forward, in order. Running them over the prompt's KV gives the same KV as the decode."""

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and new tokens."""
        return self.prompt + self.new

    def stages(self, state: State) -> list[Stage | None]:
        """Stage of every row of one of the recording's states. None for a dead row."""
        text, stages, num_right = self.text, list[Stage | None](), 0
        first_draft = state.num_committed
        for row, token in enumerate(state.tokens):
            position = state.write_index + row
            if position >= len(text) - 1:  # the row predicts a token after the end
                stages.append(None)
                continue
            num_seen = row - first_draft + 1
            num_right += num_seen > 0 and token == text[position]
            stages.append("fixed" if num_right >= num_seen else "partial" if num_right else "guess")
        return stages

    def to_json(self) -> str:
        """The recording as one line of JSON."""
        return json.dumps([self.id, self.prompt, self.new, self.states], separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Recording:
        """Parse a line that ``to_json`` wrote.

        Raises:
            ValueError, TypeError: the line is not a recording.
        """
        name, prompt, new, states = json.loads(line)
        return cls(
            id=name,
            prompt=tuple(prompt),
            new=tuple(new),
            states=tuple(State(start, committed, tuple(tokens)) for start, committed, tokens in states),
        )


def recording_of(name: str, prompt: Sequence[int], forwards: Sequence[ForwardRecord]) -> Recording:
    """The recording of a request, from the records of its forwards. Each block has one committed token."""
    return Recording(
        id=name,
        prompt=tuple(prompt),
        new=tuple(token for record in forwards for token in record.new),
        states=tuple(State(record.write_index, 1, tuple(record.block)) for record in forwards),
    )


def write_recordings(path: Path, recordings: Iterable[Recording]) -> None:
    """Write recordings, one per line."""
    path.write_text("".join(recording.to_json() + "\n" for recording in recordings), encoding="utf-8")


def read_recordings(path: Path) -> Iterator[Recording]:
    """Read recordings one by one.

    Raises:
        ValueError, TypeError: a line is damaged.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Recording.from_json(line)
