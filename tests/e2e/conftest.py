"""The command line, run in this process (which saves an import of torch) or in one of its own."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cllm_export.cli import main
from tests.conftest import Workshop

Snapshot = dict[str, tuple[int, int]]
TIMEOUT = 240


class Outcome(NamedTuple):
    """How a command ended. A run in this process decodes its output as a subprocess's would be."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> str:
        """Standard error without the lines about progress, which begin with the time."""
        return "".join(line for line in self.err.splitlines(keepends=True) if not re.match(r"\[[\d:]+\] ", line))


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run ``cllm-export`` in this process: ``cli("build", checkpoint, "--output", bundle, stdin=b"")``."""

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["cllm-export", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit_info:
            main()
            raise SystemExit(0)
        code = exit_info.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *capfd.readouterr())

    return run


def run_process(*arguments: object, stdin: bytes = b"", prelude: str = "", check: bool = False) -> Outcome:
    """Run ``cllm-export`` in a process of its own, with pipes for its streams; ``prelude`` is Python run before it."""
    code = f"{prelude}\nfrom cllm_export.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, env=environment(), check=False)
    outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not check or outcome.code == 0, outcome
    return outcome


def environment() -> dict[str, str]:
    """That of this process, but for what would make a pipe look like a terminal."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
    }
    return kept | {"OMP_NUM_THREADS": "1"}


def assert_refused(outcome: Outcome, *phrases: str) -> None:
    """Exit code 2, one message with every phrase, nothing on standard output, and never a traceback."""
    assert outcome.code == 2, outcome
    assert outcome.out == "", outcome
    assert "Traceback" not in outcome.err, outcome
    assert "defect" not in outcome.err, outcome
    text = " ".join(outcome.err.split())
    for phrase in phrases:
        assert phrase in text, f"{phrase!r} is not in: {text}"


def snapshot(directory: Path) -> Snapshot:
    """Size and modification time of everything below a directory, dot-files too."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() or path.is_symlink()]
    entries = {str(path.relative_to(directory)): path.lstat() for path in paths}
    found = {name: (entry.st_size, entry.st_mtime_ns) for name, entry in entries.items()}
    return found | {f"{path.relative_to(directory)}/": (0, 0) for path in directory.rglob("*") if path.is_dir()}


@pytest.fixture(scope="session")
def small(workshop: Workshop) -> Path:
    """A checkpoint of one layer, which traces in half the time; copy it before a change."""
    return workshop.checkpoint("small")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a build may write: alone in its directory, so that anything left beside it is seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"
