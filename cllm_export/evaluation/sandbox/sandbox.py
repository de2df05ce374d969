"""Runs untrusted Python in a separate process that can only compute. Linux only; see ``confinement.py``.

The child confines itself before it runs any of the program:

- rlimits bound memory, time and file size;
- Landlock forbids writing to anything but /dev/null;
- seccomp forbids new processes and threads, sockets, signals to others, and changes of owners, modes or mounts;
- all capabilities are dropped.

If the kernel lacks one of these, nothing is run.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError

UNPROTECTED = (
    "reading files that this user may read, programs that fake a pass on purpose, a flaw of the kernel, or the use of "
    "one core and the memory limit while it runs: run untrusted models on a machine that holds nothing of worth"
)
CONFINEMENT = Path(__file__).with_name("confinement.py")
READY = b"ready\n"
Outcome = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Resources that one program may use."""

    seconds: int = 10
    """Limit of wall-clock time and of processor time."""
    memory_bytes: int = 1 << 30
    """Limit of the address space, including the interpreter's own."""

    def __post_init__(self) -> None:
        require_at_least("seconds", self.seconds, 1)
        require_at_least("memory_bytes", self.memory_bytes, 1 << 26)


def run_confined(program: str, check: str, limits: SandboxLimits) -> Outcome:
    """Run a program, then its check in the same namespace. They pass only if both reach their end.

    A program that exits early does not pass, because the child reports the end of the check with a secret word.

    Raises:
        OptionError: this system cannot confine a process in this way.
    """
    word = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="cllm-export-sandbox-") as directory:
            timed_out = _run(program, check, word, writing, limits, directory)
        report = os.read(reading, 4096)
    finally:
        os.close(reading)
    if not report.startswith(READY):
        raise OptionError(
            "allow_code_execution: this system cannot confine a process "
            f"({report.decode(errors='replace') or 'the interpreter did not start'}): it takes Linux 5.13 or newer "
            "with Landlock and seccomp, on x86-64 or arm64"
        )
    if timed_out:
        return "timed out"
    return "passed" if report == READY + word.encode() else "failed"


def _run(program: str, check: str, word: str, writing: int, limits: SandboxLimits, directory: str) -> bool:
    """Run the child to its end or its time limit, and return whether it timed out. Closes ``writing``."""
    interpreter = os.path.realpath(sys.executable)
    settings = f"{writing}\n{word}\n{limits.seconds}\n{limits.memory_bytes}\n{len(program)}\n"
    try:
        process = subprocess.Popen(  # noqa: S603 - running code is what this is for
            [interpreter, "-I", "-S", "-B", str(CONFINEMENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
    try:
        process.communicate((settings + program + check).encode("utf-8", "replace"), timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        return True
    finally:
        _kill(process)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
