"""The seam between a task and the loop that evaluates it: prompts go out, texts come back, scores come of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from cllm_export.evaluation.tasks.scores import Scores
from cllm_export.prompts import Message, Prompt

TaskName = Literal["spider", "gsm8k", "humaneval", "prompts"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


class Task(Protocol):
    """One task over one data file."""

    @property
    def name(self) -> TaskName: ...

    @property
    def max_new_tokens(self) -> int:
        """The length limit where the user names none."""
        ...

    def prompts(self, *, chat: bool) -> list[Prompt]:
        """One prompt for each example: as chat messages for a model with a chat template, else as text."""
        ...

    def stop(self, *, chat: bool) -> Sequence[str]:
        """Strings that end an answer."""
        ...

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        """Judge the texts decoded for the examples with these numbers; the others were skipped."""
        ...


def user_message(content: str) -> tuple[Message, ...]:
    """A chat of one message, the user's."""
    return ({"role": "user", "content": content},)
