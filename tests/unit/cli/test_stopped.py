"""Commands that a signal, a closed output or a lack of memory ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_export.cli import main

COMMAND = """
import signal, sys
from pathlib import Path
import cllm_export.tensorrt.doctor as doctor
from cllm_export.bundle.storage import staged_output
from cllm_export.cli import main

def write():
    with staged_output(Path("output"), force=False, marker="bundle.json") as staging:
        (staging / "half").write_text("half")
        print("ready", flush=True)
        {work}

doctor.examine = write
sys.argv = ["cllm-export", "doctor"]
main()
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


def start(place: Path, work: str) -> subprocess.Popen[str]:
    """A command that does this work while it writes a directory."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(work=work)],
        cwd=place,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_command_with_one_sentence(tmp_path: Path, number: signal.Signals, word: str):
    """It leaves nothing, and exits as a shell says that the signal does."""
    with start(tmp_path, "signal.pause()") as command:
        assert command.stdout and command.stdout.readline() == "ready\n"
        command.send_signal(number)
        _, err = command.communicate()
    assert command.returncode == 128 + number
    assert err.splitlines()[-1].startswith(f"stopped by {word}: nothing was saved, and nothing is left half-written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["a table", "plain text"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(form: tuple[str, ...]):
    """As it does for the system's own commands in `... | head -1`. Rich has an exit code of its own for it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cllm_export", "doctor", *form]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_lack_of_memory_is_no_defect(tmp_path: Path):
    with start(tmp_path, "raise MemoryError('9 TB')") as command:
        _, err = command.communicate()
    assert command.returncode == 2
    assert err == "error: there is not enough memory (9 TB): ask for less, or free some\n"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_output_is_named(tmp_path: Path):
    shell = f'exec "{sys.executable}" -m cllm_export doctor >&-'
    done = subprocess.run(
        ["/bin/sh", "-c", shell], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed")


def test_a_command_in_a_process_of_others_leaves_its_handler_as_it_was(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["cllm-export", "doctor"])
    with pytest.raises(SystemExit):
        main()
    assert signal.getsignal(signal.SIGTERM) is before


SLOW = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_while_modules_are_imported_gives_one_sentence_too(tmp_path: Path, number: signal.Signals, word: str):
    """The first second of a command is that of its imports, of numpy and others."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(SLOW)
    first = environment()["PYTHONPATH"]
    with subprocess.Popen(
        [sys.executable, "-m", "cllm_export", "doctor"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{first}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        assert command.stdout and command.stdout.readline() == "ready\n"
        command.send_signal(number)
        _, err = command.communicate()
    assert command.returncode == 128 + number
    assert (
        err == f"stopped by {word}: nothing was saved, and nothing is left half-written; run the same command again\n"
    )
