"""The task ``prompts``: any prompt file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cllm_export.evaluation.tasks.questions import Question, read_questions
from cllm_export.evaluation.tasks.score_prompts import score_prompts
from cllm_export.evaluation.tasks.scores import Scores
from cllm_export.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """Prompts unchanged from their file, as text or messages."""

    questions: tuple[Question, ...]
    name: Literal["prompts"] = "prompts"
    max_new_tokens: int = 128

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None) -> PromptTask:
        """Read a prompt file."""
        return cls(questions=tuple(read_questions(path, limit=limit)))

    def prompts(self, *, chat: bool) -> list[Prompt]:
        return [question.prompt for question in self.questions]

    def stop(self, *, chat: bool) -> Sequence[str]:
        return ()

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        return score_prompts([self.questions[index] for index in indices], texts)
