"""The task ``gsm8k``: word problems, judged by the final number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from cllm_export.errors import DataError
from cllm_export.evaluation.tasks.data import read_examples
from cllm_export.evaluation.tasks.final_number import final_number
from cllm_export.evaluation.tasks.scores import Scores, summarize_judgements
from cllm_export.evaluation.tasks.task import user_message
from cllm_export.prompts import Message, Prompt

PLAIN_FORM = "Question:\n{question}\nAnswer:\nLet's think step by step.\n"
CHAT_FORM = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
FINAL_NUMBER = "final_number"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One word problem."""

    id: str
    question: str
    answer: str
    number: Decimal


@dataclass(frozen=True, kw_only=True)
class Gsm8kTask:
    """Problems of GSM8K (arXiv 2110.14168), zero-shot. Text prompts have the CLLM paper's form, chats the usual one."""

    problems: tuple[Problem, ...]
    name: Literal["gsm8k"] = "gsm8k"
    max_new_tokens: int = 512

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None) -> Gsm8kTask:
        """Read ``test.jsonl`` or ``train.jsonl``.

        Raises:
            DataError: the file is missing or malformed, or an answer does not end with a number.
        """
        return cls(problems=tuple(read_problems(path, limit=limit)))

    def prompts(self, *, chat: bool) -> list[Prompt]:
        return [
            Prompt(id=problem.id, content=_content(problem.question, chat), answer=problem.answer)
            for problem in self.problems
        ]

    def stop(self, *, chat: bool) -> Sequence[str]:
        return () if chat else ("\nQuestion:",)

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        return score_gsm8k([self.problems[index] for index in indices], texts)


def read_problems(path: Path, *, limit: int | None = None) -> list[Problem]:
    """The problems of a data file; see ``Gsm8kTask.read``."""
    problems = []
    for index, example in enumerate(read_examples(path, "gsm8k", limit=limit), start=1):
        number = final_number(example["answer"])
        if number is None:
            raise DataError(f"{path}, example {index}: the answer ends with no number: {example['answer']!r:.80}")
        problems.append(Problem(id=str(index), question=example["question"], answer=example["answer"], number=number))
    return problems


def score_gsm8k(problems: Sequence[Problem], texts: Sequence[str]) -> Scores:
    """Judge one decoded text for each problem. It is right if its final number equals that of the answer."""
    return summarize_judgements(
        [{FINAL_NUMBER: final_number(text) == problem.number} for problem, text in zip(problems, texts, strict=True)]
    )


def _content(question: str, chat: bool) -> str | tuple[Message, ...]:
    return user_message(CHAT_FORM.format(question=question)) if chat else PLAIN_FORM.format(question=question)
