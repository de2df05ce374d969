"""The scorers on the whole public data sets, where they lie beside the repository: they are no part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm_export.evaluation.tasks.gsm8k_task import read_problems as read_gsm8k
from cllm_export.evaluation.tasks.gsm8k_task import score_gsm8k
from cllm_export.evaluation.tasks.humaneval_task import read_problems as read_humaneval
from cllm_export.evaluation.tasks.humaneval_task import score_humaneval
from cllm_export.evaluation.tasks.spider_prompt import read_spider
from cllm_export.evaluation.tasks.spider_task import score_spider

DATA = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets are not at {DATA}")


def test_spiders_gold_queries_score_full_marks_and_corrupted_ones_nothing():
    examples = read_spider(DATA / "spider" / "dev.json")
    gold = [example.query for example in examples]
    right = score_spider(examples, gold)
    assert right.value("exact_set_match") == right.value("execution_match") == 1.0
    assert right.value("gold_result_empty") < 0.02
    wrong = score_spider(examples, [f"SELECT count(*) + 1000 FROM ({query.strip().rstrip(';')})" for query in gold])
    assert wrong.value("exact_set_match") == wrong.value("execution_match") == 0.0


def test_gsm8ks_answers_score_full_marks_and_wrong_numbers_nothing():
    problems = read_gsm8k(DATA / "gsm8k" / "test.jsonl")
    assert score_gsm8k(problems, [problem.answer for problem in problems]).value("final_number") == 1.0
    wrong = score_gsm8k(problems, [f"The answer is {problem.number + 1}." for problem in problems])
    assert wrong.value("final_number") == 0.0


@pytest.mark.slow
def test_humanevals_canonical_solutions_score_full_marks_and_empty_ones_nothing():
    problems = read_humaneval(DATA / "humaneval" / "HumanEval.jsonl.gz")
    right = score_humaneval(problems, [str(problem.canonical_solution) for problem in problems])
    assert right.value("passes_tests") == 1.0
    wrong = score_humaneval(problems, ["    return ...\n"] * len(problems))
    assert wrong.value("passes_tests") == 0.0
