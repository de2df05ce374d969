"""The commands of the README and of the quick start, run in their order in a fresh clone, as a newcomer pastes them.

Each page begins in a clone of its own, with the checkpoint that it names replaced by one that is made on the spot.
So a line that needs a file which no earlier line made fails. The lines are those of the clone: commit before the run.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.checkpoints import CHAT_TEMPLATE, Variant, make_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md")
ELSEWHERE = {
    "make demo": "it takes minutes, and other tests build, verify, decode and time the same model",
    "make test": "CI runs it just before this test",
}
"""Lines that are not run here, and why."""
LONGEST = 240
"""Seconds after which a command hangs. On an idle machine none takes more than half a minute."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^ {4}\S[^\n]*\n)(?:^ {4}[^\n]*\n)*)", re.MULTILINE | re.DOTALL)
CHECKPOINT = re.compile(r"^ {4}CHECKPOINT=(\S+)", re.MULTILINE)


def commands_of(text: str) -> list[str]:
    """What a page tells to run, in order: the lines of its indented blocks, and each Python block as one command."""
    commands: list[str] = []
    for match in BLOCK.finditer(text):
        language, fenced, indented = match.groups()
        if indented is not None:
            joined = re.sub(r"\\\n\s*", " ", re.sub(r"^ {4}", "", indented, flags=re.MULTILINE))
            commands += [line.strip() for line in joined.splitlines() if line.strip()]
        elif language == "python":
            commands.append(f"python - <<'PYTHON'\n{fenced}PYTHON")
        else:
            raise AssertionError(f"a block of {language or 'no language'}: nobody runs it")
    return commands


def is_elsewhere(command: str) -> bool:
    return command.partition("#")[0].strip() in ELSEWHERE


def as_script(commands: list[str], progress: Path) -> str:
    """One shell that runs all, as a terminal does, and writes the number of each command before it begins."""
    parts = ["set -e -o pipefail"]
    for number, command in enumerate(commands):
        parts += [f"echo {number} > {shlex.quote(str(progress))}", command]
    return "\n".join(parts) + "\n"


def environment(directory: Path) -> dict[str, str]:
    """That of this process, with a ``python3`` whose new environments see the packages that are here.

    So pip finds torch and need not load it. It still builds and installs the package itself.
    """
    paths = "\n".join(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    (directory / "here.pth").write_text(paths + "\n", encoding="utf-8")
    shim = directory / "python3"
    shim.write_text(
        "#!/bin/sh\n"
        f'{shlex.quote(sys.executable)} "$@" || exit\n'
        'if [ "$1 $2" = "-m venv" ]; then\n'
        f'  cp {shlex.quote(str(directory / "here.pth"))} "$3"/lib/python3*/site-packages/\n'
        "fi\n",
        encoding="utf-8",
    )
    shim.chmod(0o755)
    kept = {
        name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    }
    return kept | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run(commands: list[str], *, cwd: Path, scratch: Path, longest: float = LONGEST) -> None:
    """Run the commands in one shell. A command that fails, or that takes too long, is named with what it said."""
    progress, log = scratch / "progress", scratch / "log"
    progress.write_text("-1", encoding="utf-8")
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-c", as_script(commands, progress)],
            cwd=cwd,
            env=environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        fault = _wait(shell, progress, longest)
    if fault:
        number = int(progress.read_text(encoding="utf-8") or -1)
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        pytest.fail(f"{fault}: {commands[number] if number >= 0 else 'the shell'}\n{said}", pytrace=False)


def _wait(shell: subprocess.Popen[bytes], progress: Path, longest: float) -> str | None:
    """What went wrong, once the shell has ended. It is stopped if one command runs for too long."""
    while True:
        try:
            code = shell.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if time.time() - progress.stat().st_mtime > longest:
                os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
                return f"still running after {longest:.0f} s"
        else:
            return f"exit code {code}" if code else None


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, tmp_path / "clone"], check=True)
    return tmp_path / "clone"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody has seen, long enough for the demo's prompts."""
    variant = Variant(num_layers=1, max_positions=1024, chat_template=CHAT_TEMPLATE)
    return make_checkpoint(tmp_path_factory.mktemp("newcomer") / "checkpoint", variant)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_their_order(page: str, clone: Path, scratch: Path, checkpoint: Path):
    text = (clone / page).read_text(encoding="utf-8")
    [named] = CHECKPOINT.findall(text)
    assert (clone / named / "config.json").is_file()
    text = CHECKPOINT.sub(lambda _: f"    CHECKPOINT={shlex.quote(str(checkpoint))}", text)
    run([command for command in commands_of(text) if not is_elsewhere(command)], cwd=clone, scratch=scratch)


def test_what_runs_elsewhere_is_still_on_a_page():
    commands = [command for page in PAGES for command in commands_of((ROOT / page).read_text(encoding="utf-8"))]
    assert {command.partition("#")[0].strip() for command in commands if is_elsewhere(command)} == set(ELSEWHERE)


def test_a_line_that_needs_a_file_that_nobody_made_is_named(tmp_path: Path, scratch: Path):
    with pytest.raises(pytest.fail.Exception, match=r"exit code 1: cat parent-bundle/bundle.json"):
        run(["true", "cat parent-bundle/bundle.json", "true"], cwd=tmp_path, scratch=scratch)


def test_a_command_that_hangs_is_stopped_and_named(tmp_path: Path, scratch: Path):
    with pytest.raises(pytest.fail.Exception, match=r"still running after 1 s: sleep 600"):
        run(["true", "sleep 600", "true"], cwd=tmp_path, scratch=scratch, longest=1)


def test_commands_are_taken_in_the_order_of_the_page():
    page = "# A\n\n    one \\\n        two\n    three  # why\n\nText.\n\n```python\nfour\n```\n\n    five\n"
    assert commands_of(page) == ["one  two", "three  # why", "python - <<'PYTHON'\nfour\nPYTHON", "five"]
