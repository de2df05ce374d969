"""The sandbox: a program may compute, and do nothing else; only one that reaches the end of its tests has passed."""

from __future__ import annotations

import platform
import sys
import threading
from pathlib import Path

import pytest

from cllm_export.errors import OptionError
from cllm_export.evaluation.sandbox.sandbox import SandboxLimits, run_confined
from cllm_export.evaluation.tasks.humaneval_task import HumanevalTask, program, read_problems, score_humaneval
from tests.evaluation_data import HUMANEVAL, write_lines

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the sandbox needs Linux on x86-64 or arm64",
)
LIMITS = SandboxLimits(seconds=5, memory_bytes=1 << 29)
SHORT = SandboxLimits(seconds=1, memory_bytes=1 << 29)
CHECK = "assert answer() == 42\n"
RIGHT = "def answer():\n    return 42\n"


def run(prelude: str, limits: SandboxLimits = LIMITS) -> str:
    """A right program that does something else first."""
    return run_confined(f"{prelude}\n{RIGHT}", CHECK, limits)


@pytest.fixture
def problems(tmp_path):
    return read_problems(write_lines(tmp_path / "own.jsonl", HUMANEVAL))


@pytest.mark.parametrize(
    "prelude",
    [
        "",
        "print('x' * 1_000_000)",
        "import sys; sys.stderr.write('warning')",
        "import collections, copy, datetime, decimal, hashlib, heapq, itertools, math, random, re, string, typing",
        "open('/dev/null', 'w').write('x')",
    ],
)
def test_a_harmless_program_passes(prelude):
    assert run(prelude) == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "quit()",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "def answer(): return 41",
        "def answer(:",
        "def answer(): import sys; sys.exit(0)",
        "def answer(): return input()",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_a_program_that_ends_before_its_tests_do_has_not_passed(program):
    assert run_confined(program + "\n", CHECK, LIMITS) == "failed"


@pytest.mark.parametrize("endless", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_is_stopped(endless):
    assert run(endless, SHORT) == "timed out"


@pytest.mark.parametrize("bomb", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append(bytes(1 << 24))"])
def test_a_memory_bomb_fails(bomb):
    assert run(bomb) == "failed"


@pytest.mark.parametrize(
    "prelude",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true') and exit()",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import socket; socket.socket()",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.killpg(os.getpgid(os.getppid()), 0)",
        "import os; os.chroot('/')",
    ],
)
def test_processes_threads_sockets_and_signals_are_refused(prelude):
    assert run(prelude) == "failed"


@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a').write('x')",
        "import os; os.unlink({path!r})",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r}, (1, 1))",
        "import os; os.link({path!r}, {path!r} + '2')",
        "import os; os.mkdir({path!r} + '2')",
        "open('own-directory', 'w')",
    ],
)
def test_nothing_is_written_anywhere(tmp_path, code):
    path = tmp_path / "precious"
    path.write_text("kept", encoding="utf-8")
    tmp_path.chmod(0o777)
    before = path.stat()
    assert run(code.format(path=str(path))) == "failed"
    assert path.read_text(encoding="utf-8") == "kept"
    assert (path.stat().st_mode, path.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


def test_the_environment_is_empty_and_nothing_is_left_behind(monkeypatch):
    monkeypatch.setenv("A_SECRET", "word")
    descriptors = Path("/proc/self/fd")
    before = threading.active_count(), len(list(descriptors.iterdir()))
    assert run("import os; assert 'A_SECRET' not in os.environ") == "passed"
    assert (threading.active_count(), len(list(descriptors.iterdir()))) == before


def test_canonical_solutions_score_full_marks_as_text_and_as_a_code_block(problems):
    plain = [problem.canonical_solution for problem in problems]
    fenced = [f"Sure:\n```python\n{problem.prompt}{problem.canonical_solution}```\n" for problem in problems]
    assert score_humaneval(problems, plain).value("passes_tests") == 1.0
    assert score_humaneval(problems, fenced).value("passes_tests") == 1.0


@pytest.mark.parametrize(
    "wrong", ["    return None\n", "    exit()\n", "", "    return (\n", "```python\nprint(1)\n```"]
)
def test_corrupted_solutions_score_nothing(problems, wrong):
    assert score_humaneval(problems, [wrong] * len(problems), LIMITS).value("passes_tests") == 0.0


def test_a_code_block_keeps_the_imports_of_its_prompt(problems):
    assert program(problems[0], "```python\ndef widest(gaps: List[int]):\n    return 0\n```").startswith("from typing")


def test_code_is_not_run_unless_that_is_allowed(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", HUMANEVAL)
    with pytest.raises(OptionError, match=r"allow_code_execution.*does not protect against"):
        HumanevalTask.read(path)
