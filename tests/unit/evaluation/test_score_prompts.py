"""Scores of prompt files: exact match, execution match where there are tables, and groups."""

from __future__ import annotations

import json

import pytest

from cllm_export.errors import DataError, PromptError
from cllm_export.evaluation.tasks.questions import read_questions
from cllm_export.evaluation.tasks.score_prompts import score_prompts
from tests.conftest import DEMO

TABLES = [
    {"name": "port", "cols": ["port_id", "city", "depth"], "pk": "port_id", "fk": None},
    {
        "name": "ship",
        "cols": ["ship_id", "name", "port_id"],
        "pk": "ship_id",
        "fk": "port",
        "types": ["number", "text", "number"],
    },
]
LINES = [
    {"prompt": "a", "answer": "SELECT city FROM port", "kind": "all", "tables": TABLES},
    {"prompt": "b", "answer": "SELECT city FROM port WHERE depth > 30", "kind": "where", "tables": TABLES},
    {"prompt": "c", "answer": "blue  sky"},
    {"prompt": "d"},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, LINES)), encoding="utf-8")
    return read_questions(path)


def test_each_question_is_judged_by_what_it_has(questions):
    scores = score_prompts(questions, ["SELECT city FROM port", "SELECT city FROM port", " blue sky\n", "anything"])
    assert [dict(judgement) for judgement in scores.judgements] == [
        {"exact_match": True, "execution_match": True, "gold_result_empty": False},
        {"exact_match": False, "execution_match": False, "gold_result_empty": False},
        {"exact_match": True},
        {"exact_match": None},
    ]
    assert scores.value("exact_match") == pytest.approx(2 / 3)
    assert scores.value("execution_match") == 0.5
    assert scores.groups["with a literal"]["execution_match"].value == 0.0
    assert scores.groups["without a literal"]["execution_match"].value == 1.0
    assert scores.groups["kind all"]["exact_match"].right == 1


def test_another_query_with_the_same_result_matches_in_execution_alone(questions):
    texts = ["SELECT T1.city FROM port AS T1", "SELECT city FROM port WHERE NOT depth <= 30", "", ""]
    scores = score_prompts(questions, texts)
    assert scores.value("execution_match") == 1.0
    assert scores.value("exact_match") == 0.0


def test_scores_do_not_depend_on_the_run(questions):
    texts = ["SELECT city FROM port", "SELECT depth FROM port", "x", "y"]
    assert score_prompts(questions, texts) == score_prompts(questions, texts)


def test_no_question_at_all_gives_no_score():
    assert score_prompts([], []).value("exact_match") is None


def test_the_answers_of_the_example_score_full_marks_and_other_ones_hardly_any():
    questions = read_questions(DEMO / "prompts.jsonl")
    answers = [str(question.prompt.answer) for question in questions]
    right = score_prompts(questions, answers)
    assert right.value("exact_match") == right.value("execution_match") == 1.0
    assert right.value("gold_result_empty") < 0.05
    some = questions[::10]
    wrong = score_prompts(some, [f"SELECT count(*) + 1000 FROM ({question.prompt.answer})" for question in some])
    assert wrong.value("exact_match") == wrong.value("execution_match") == 0.0


def test_plain_text_and_messages_are_questions_too(tmp_path):
    plain, chat = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\n{two\n", encoding="utf-8")
    chat.write_text('{"messages": [{"role": "user", "content": "hi"}], "answer": "hello"}', encoding="utf-8")
    assert [question.prompt.content for question in read_questions(plain)] == ["one", "{two"]
    assert read_questions(chat)[0].prompt.answer == "hello"


def test_bad_lines_are_refused_by_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "tables": [{"name": "c"}]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"prompt 2.*tables"):
        read_questions(path)
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n', encoding="utf-8")
    with pytest.raises(PromptError, match=":2"):
        read_questions(path)
