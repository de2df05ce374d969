"""The interface between a task and the evaluation loop: the task gives prompts and scores the decoded texts."""

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
        """The length limit if the user gives none."""
        ...

    def prompts(self, *, chat: bool) -> list[Prompt]:
        """One prompt for each example: chat messages if ``chat``, for a model with a chat template; else text."""
        ...

    def stop(self, *, chat: bool) -> Sequence[str]:
        """Strings that end an answer."""
        ...

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        """Judge the texts decoded for the examples with these numbers. The other examples were skipped."""
        ...


def user_message(content: str) -> tuple[Message, ...]:
    """A chat with one user message."""
    return ({"role": "user", "content": content},)
