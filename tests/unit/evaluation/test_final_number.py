"""The final number of an answer, in every spelling that models use."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cllm_export.evaluation.tasks.final_number import final_number
from cllm_export.evaluation.tasks.gsm8k_task import Gsm8kTask, read_problems, score_gsm8k
from tests.evaluation_data import GSM8K, write_lines


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("3 x 400 = <<3*400=1200>>1200\n#### 1,200", "1200"),
        ("####-5", "-5"),
        ("#### 7\nQuestion: another one with 99", "7"),
        ("The answer is 42.", "42"),
        ("the answer is: $1,234.50.", "1234.50"),
        ("So the answer is **-3**", "-3"),
        ("The final answer is \\boxed{\\$2,000}", "2000"),
        ("\\boxed{-7}", "-7"),
        ("We get 16 - 3 - 4 = 9", "9"),
        ("That makes 12 dollars, or $18.", "18"),
        ("It is \u22125 degrees", "-5"),
        ("-$5", "-5"),
        ("about .5 of it", "0.5"),
        ("x2 is 3.0", "3"),
    ],
)
def test_the_final_number_is_found(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "x2"])
def test_a_text_without_a_number_has_none(text):
    assert final_number(text) is None


def test_the_answers_score_full_marks_and_wrong_ones_nothing(tmp_path):
    problems = read_problems(write_lines(tmp_path / "test.jsonl", GSM8K))
    right = [problem.answer for problem in problems]
    assert score_gsm8k(problems, right).value("final_number") == 1.0
    for wrong in (
        [f"{answer}1" for answer in right],
        [f"#### {problem.number + 1}" for problem in problems],
        [f"#### {-problem.number}" for problem in problems],
        ["" for _ in right],
    ):
        assert score_gsm8k(problems, wrong).value("final_number") == 0.0


def test_prompts_are_text_or_messages(tmp_path):
    task = Gsm8kTask.read(write_lines(tmp_path / "test.jsonl", GSM8K), limit=1)
    [plain], [chat] = task.prompts(chat=False), task.prompts(chat=True)
    assert plain.content == f"Question:\n{GSM8K[0]['question']}\nAnswer:\nLet's think step by step.\n"
    assert chat.content[0]["role"] == "user"
    assert GSM8K[0]["question"] in chat.content[0]["content"]
