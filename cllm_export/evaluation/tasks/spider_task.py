"""The task ``spider``: text to SQL over unseen databases, judged by exact-set match and execution match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cllm_export.evaluation.sql.exact_set_match import exact_set_match
from cllm_export.evaluation.sql.execution import execution_matches_by_schema
from cllm_export.evaluation.sql.sql_literals import has_literal
from cllm_export.evaluation.tasks.code_block import fenced_code
from cllm_export.evaluation.tasks.score_prompts import EMPTY, EXACT, EXECUTION, GENERATED_ROWS
from cllm_export.evaluation.tasks.scores import Judgement, Scores, summarize_judgements
from cllm_export.evaluation.tasks.spider_prompt import SpiderExample, clean_query, read_spider, spider_prompt
from cllm_export.evaluation.tasks.task import user_message
from cllm_export.prompts import Prompt

SET_MATCH = "exact_set_match"
NOTES = (
    "exact-set match is this project's own reading of Spider's metric without values: figures may differ by a little "
    "from those of the official script",
    GENERATED_ROWS,
)


@dataclass(frozen=True, kw_only=True)
class SpiderTask:
    """Questions of Spider with their schemas."""

    examples: tuple[SpiderExample, ...]
    name: Literal["spider"] = "spider"
    max_new_tokens: int = 128

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None) -> SpiderTask:
        """Read ``dev.json`` or ``train.json``, with ``tables.json`` beside it."""
        return cls(examples=tuple(read_spider(path, limit=limit)))

    def prompts(self, *, chat: bool) -> list[Prompt]:
        texts = [spider_prompt(example.schema, example.question) for example in self.examples]
        return [
            Prompt(id=example.id, content=user_message(text) if chat else text, answer=example.query)
            for example, text in zip(self.examples, texts, strict=True)
        ]

    def stop(self, *, chat: bool) -> Sequence[str]:
        return () if chat else (";", "\n\n")

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        return score_spider([self.examples[index] for index in indices], texts)


def score_spider(examples: Sequence[SpiderExample], texts: Sequence[str]) -> Scores:
    """Judge one decoded text for each question."""
    queries = [predicted_query(text) for text in texts]
    verdicts = execution_matches_by_schema(
        {index: example.schema for index, example in enumerate(examples)},
        {
            index: (clean_query(example.query), query)
            for index, (example, query) in enumerate(zip(examples, queries, strict=True))
        },
    )
    judgements: list[Judgement] = [
        {
            SET_MATCH: exact_set_match(example.schema, clean_query(example.query), query).matches,
            EXECUTION: verdicts[index].matches,
            EXACT: clean_query(example.query).lower() == query.lower(),
            EMPTY: verdicts[index].gold_is_empty,
        }
        for index, (example, query) in enumerate(zip(examples, queries, strict=True))
    ]
    groups = [["with a literal" if has_literal(example.query) else "without a literal"] for example in examples]
    return summarize_judgements(judgements, groups, NOTES)


def predicted_query(text: str) -> str:
    """The query in an answer, on one line.

    It is taken from the code block if there is one, and ends at the first semicolon outside quoted text.
    """
    code = fenced_code(text)
    return " ".join(_until_semicolon(text if code is None else code).split())


def _until_semicolon(text: str) -> str:
    quote = ""
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == ";":
            return text[:index]
    return text
