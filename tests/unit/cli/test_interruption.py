"""A command that a signal ends: one sentence says what was saved, and the exit code names the signal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_export.cli import main, run_demo
from cllm_export.prompts import Prompt

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(__file__).parents[3] / "examples" / "text_to_sql"


def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: Path) -> tuple[int, str]:
    """Exit code and the last line of standard error of the demo."""
    monkeypatch.setattr(sys, "argv", ["cllm-export", "demo", "--example", str(example), "--output", "made"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err.splitlines()[-1]


def sending(number: int) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("sent", "code"), SIGNALS)
def test_a_demo_that_is_stopped_while_it_builds_left_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: Path, sent: signal.Signals, code: int
):
    monkeypatch.setattr(run_demo, "_build", sending(sent))
    expected = f"stopped by {sent.name}: made is as it was before: run the same command again"
    assert demo(monkeypatch, capsys, example) == (code, expected)


@pytest.mark.parametrize(("sent", "code"), SIGNALS)
def test_a_demo_that_is_stopped_later_names_the_bundle_that_it_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: Path, sent: signal.Signals, code: int
):
    monkeypatch.setattr(run_demo, "_build", lambda *_, **__: None)
    monkeypatch.setattr(run_demo, "_verify", sending(sent))
    found, line = demo(monkeypatch, capsys, example)
    assert found == code
    assert line.startswith(f"stopped by {sent.name}: made is whole: go on with cllm-export verify")


@pytest.mark.parametrize(("sent", "code"), SIGNALS)
def test_a_command_that_keeps_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: Path, sent: signal.Signals, code: int
):
    def read_and_stop(_: Path) -> list[Prompt]:
        os.kill(os.getpid(), sent)
        return []

    monkeypatch.setattr(run_demo, "read_prompts", read_and_stop)
    expected = (
        f"stopped by {sent.name}: nothing was saved, and nothing is left half-written; run the same command again"
    )
    assert demo(monkeypatch, capsys, example) == (code, expected)


def test_the_handler_of_sigterm_that_was_there_before_is_back_after_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: Path
):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_demo, "_build", sending(signal.SIGTERM))
    demo(monkeypatch, capsys, example)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_is_stopped_before_it_wrote_anything_leaves_no_directory(tmp_path: Path):
    pytest.importorskip("torch")
    from cllm_export.training.work import WorkDirectory

    work = WorkDirectory(tmp_path / "made", force=False, resume=False)
    work._lock_directory()
    assert work.path.is_dir()
    work.close()
    assert list(tmp_path.iterdir()) == []
