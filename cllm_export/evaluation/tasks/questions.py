"""Reads prompt files with the fields that scoring needs: the answer, the kind, and the tables of the question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    prompts = read_prompts(path, limit=limit)
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return [_question(prompt, line, path) for prompt, line in zip(prompts, lines, strict=False)]


def _question(prompt: Prompt, line: str, path: Path) -> Question:
    raw = _fields(line)
    kind, tables = raw.get("kind"), raw.get("tables")
    return Question(
        prompt=prompt,
        kind=None if kind is None else str(kind),
        schema=None if tables is None else schema_from_tables(tables, f"{path}, prompt {prompt.id}"),
    )


def _fields(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:  # plain text: each line is a prompt
        return {}
    return raw if isinstance(raw, dict) else {}
