"""The task ``humaneval``: function completion, judged by running the tests of each problem in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cllm_export.errors import OptionError
from cllm_export.evaluation.sandbox.sandbox import UNPROTECTED, SandboxLimits, run_confined
from cllm_export.evaluation.tasks.code_block import fenced_code
from cllm_export.evaluation.tasks.data import read_examples
from cllm_export.evaluation.tasks.scores import Scores, summarize_judgements
from cllm_export.evaluation.tasks.task import user_message
from cllm_export.prompts import Prompt

CHAT_FORM = (
    "Please continue to complete the function. You are not allowed to modify the given code and do the completion "
    "only. Please return all completed function in a codeblock. Here is the given code to do completion:\n"
    "```python\n{prompt}\n```"
)
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")
PASSES, TIMED_OUT = "passes_tests", "timed_out"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One function to complete."""

    id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str | None = None


@dataclass(frozen=True, kw_only=True)
class HumanevalTask:
    """Problems of HumanEval (arXiv 2107.03374).

    Text prompts are plain completions. Chat prompts have the form of the Jacobi Forcing paper.
    """

    problems: tuple[Problem, ...]
    name: Literal["humaneval"] = "humaneval"
    max_new_tokens: int = 512

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None, allow_code_execution: bool = False) -> HumanevalTask:
        """Read ``HumanEval.jsonl``, gzip or not.

        Raises:
            DataError: the file is missing or malformed.
            OptionError: code execution is not allowed.
        """
        if not allow_code_execution:
            raise OptionError(
                "task='humaneval' runs code that the model wrote: allow it with allow_code_execution. It runs in a "
                f"sandbox, which does not protect against {UNPROTECTED}"
            )
        return cls(problems=tuple(read_problems(path, limit=limit)))

    def prompts(self, *, chat: bool) -> list[Prompt]:
        return [
            Prompt(
                id=problem.id,
                content=user_message(CHAT_FORM.format(prompt=problem.prompt.strip())) if chat else problem.prompt,
                answer=problem.canonical_solution,
            )
            for problem in self.problems
        ]

    def stop(self, *, chat: bool) -> Sequence[str]:
        return () if chat else STOPS

    def score(self, indices: Sequence[int], texts: Sequence[str]) -> Scores:
        return score_humaneval([self.problems[index] for index in indices], texts)


def read_problems(path: Path, *, limit: int | None = None) -> list[Problem]:
    """The problems of a data file; see ``HumanevalTask.read``."""
    return [
        Problem(
            id=example["task_id"],
            prompt=example["prompt"],
            entry_point=example["entry_point"],
            test=example["test"],
            canonical_solution=example.get("canonical_solution"),
        )
        for example in read_examples(path, "humaneval", limit=limit)
    ]


def score_humaneval(problems: Sequence[Problem], texts: Sequence[str], limits: SandboxLimits | None = None) -> Scores:
    """Run the tests of each problem on the decoded text. This executes untrusted code: see ``sandbox.py``."""
    outcomes = [
        run_confined(program(problem, text), _check(problem), limits or SandboxLimits())
        for problem, text in zip(problems, texts, strict=True)
    ]
    return summarize_judgements(
        [{PASSES: outcome == "passed", TIMED_OUT: outcome == "timed out"} for outcome in outcomes],
        notes=(f"code ran in a sandbox, which does not protect against {UNPROTECTED}",),
    )


def program(problem: Problem, text: str) -> str:
    """The program that a text completes: the prompt, followed by the code block of the text or by the text itself.

    If the code block repeats the function's signature, only the part of the prompt before the signature is kept.
    """
    code = fenced_code(text)
    if code is None:
        return problem.prompt + text
    signature = f"def {problem.entry_point}"
    if signature not in code:
        return problem.prompt + code
    return problem.prompt.split(signature)[0] + code


def _check(problem: Problem) -> str:
    return f"{problem.test}\ncheck({problem.entry_point})\n"
