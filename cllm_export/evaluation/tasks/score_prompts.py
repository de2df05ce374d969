"""Scores the answers to a prompt file: exact match, and execution match if the lines have tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cllm_export.evaluation.sql.execution import Verdict, execution_matches_by_schema
from cllm_export.evaluation.sql.sql_literals import has_literal
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.evaluation.tasks.scores import Judgement, Scores, summarize_judgements

EXACT, EXECUTION, EMPTY = "exact_match", "execution_match", "gold_result_empty"
WITH_LITERAL, WITHOUT_LITERAL = "with a literal", "without a literal"
GENERATED_ROWS = (
    "execution match runs on SQLite files with generated rows, as the original rows are not at hand: three databases a "
    f"schema, seeded, on all of which the results must agree; where {EMPTY}, a match says little"
)


def score_prompts(questions: Sequence[Question], texts: Sequence[str]) -> Scores:
    """Judge one decoded text for each question. The result is the same on every run.

    ``exact_match`` compares with the answer, ignoring differences of whitespace. ``execution_match`` compares the
    results of SQL on generated rows. ``gold_result_empty`` is the share of answers that find nothing there. A measure
    is None for a question that lacks the field it needs.

    Groups are: with and without a literal in the answer, and each kind.
    """
    verdicts = _execute(questions, texts)
    judgements = [
        _judge(question, text, verdicts.get(index))
        for index, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]
    return summarize_judgements(
        judgements, [list(_groups(question)) for question in questions], (GENERATED_ROWS,) if verdicts else ()
    )


def normalise(text: str) -> str:
    """The text with each run of whitespace replaced by one space, and none at its ends."""
    return " ".join(text.split())


def _execute(questions: Sequence[Question], texts: Sequence[str]) -> dict[int, Verdict]:
    pairs = {
        index: (normalise(question.prompt.answer), normalise(texts[index]))
        for index, question in enumerate(questions)
        if question.schema and question.prompt.answer is not None
    }
    schemas = {index: question.schema for index, question in enumerate(questions) if question.schema}
    return execution_matches_by_schema(schemas, pairs)


def _judge(question: Question, text: str, verdict: Verdict | None) -> Judgement:
    answer = question.prompt.answer
    judgement: dict[str, bool | None] = {EXACT: None if answer is None else normalise(answer) == normalise(text)}
    if verdict:
        judgement |= {EXECUTION: verdict.matches, EMPTY: verdict.gold_is_empty}
    return judgement


def _groups(question: Question) -> Iterator[str]:
    if question.schema and question.prompt.answer is not None:
        yield WITH_LITERAL if has_literal(question.prompt.answer) else WITHOUT_LITERAL
    if question.kind is not None:
        yield f"kind {question.kind}"
