"""Reads prompt files with the fields that scoring needs: the answer, the kind, and the tables of the question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cllm_export.evaluation.sql.schema import Schema, schema_from_tables
from cllm_export.prompts import Prompt, read_prompts


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of a prompt file."""

    prompt: Prompt
    kind: str | None = None
    schema: Schema | None = None
    """The database of the question, if the line has ``tables``. The answer is then SQL and can be executed."""


def read_questions(path: Path, *, limit: int | None = None) -> list[Question]:
    """Read a prompt file as ``read_prompts`` does, with the optional ``kind`` and ``tables`` of its lines.

    Raises:
        PromptError: as for ``read_prompts``.
        DataError: ``tables`` is malformed. The message names the prompt.
    """
    return [_question(prompt, path) for prompt in read_prompts(path, limit=limit)]


def _question(prompt: Prompt, path: Path) -> Question:
    tables = prompt.tables
    schema = None if tables is None else schema_from_tables(list(tables), f"{path}, prompt {prompt.id}")
    return Question(prompt=prompt, kind=prompt.kind, schema=schema)
