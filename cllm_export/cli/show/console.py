"""Terminal output: tables, progress bars and colours. In a pipe the output is plain text, progress too."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from cllm_export.progress import Progress, ProgressLines, heartbeat

PIPE_WIDTH = 200
"""Width in columns if there is no terminal. No table of this project is wider, and a wrapped table is hard to read."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line end the command. By default Rich does, with an exit code of its own."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console(*, stderr: bool) -> Console:
    console = _Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


OUT, ERR = _console(stderr=False), _console(stderr=True)

FAST_FORWARDED, ACCEPTED, STATIONARY, REJECTED = "green", "bold white on green", "yellow", "dim"

MARKS = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}


_running: ContextVar[ProgressLines | None] = ContextVar("running", default=None)
"""The lines about the command that runs. None where a terminal shows a bar instead, or another process writes them."""


_spell: ContextVar[Callable[[str], str]] = ContextVar("spell", default=str)
"""Puts the flags of the command that runs in place of the names of options."""


@contextmanager
def spelling(spell: Callable[[str], str]) -> Iterator[None]:
    """Let ``say`` spell the names of options in this way during the block."""
    token = _spell.set(spell)
    try:
        yield
    finally:
        _spell.reset(token)


@contextmanager
def progress_lines() -> Iterator[None]:
    """Write plain lines about the progress of a command on standard error, unless that is a terminal."""
    if sys.stderr is None or sys.stderr.isatty() or not is_first_process():
        yield
        return
    lines = ProgressLines(_print_line, stage="starting")
    token = _running.set(lines)
    try:
        with heartbeat(lines):
            yield
    finally:
        _running.reset(token)


def is_first_process() -> bool:
    """Whether this process speaks for all those that ``torchrun`` or ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def plain_progress() -> Progress:
    """A progress callback that writes plain lines, and draws no bar: for commands whose text goes to the terminal."""
    return _running.get() or (lambda *_: None)


@contextmanager
def streaming_text(*, interactive: bool = False) -> Iterator[None]:
    """Keep lines of progress back during the block if they would stand in the middle of the text on standard output.

    Args:
        interactive: keep them back in any case, because most of the time the program waits for its user.
    """
    lines = _running.get()
    if lines is None or not (interactive or _share_a_file()):
        yield
        return
    lines.is_hushed = True
    try:
        yield
    finally:
        lines.is_hushed = False


def _share_a_file() -> bool:
    """Whether standard output and standard error go to one file, as with 2>&1."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # not files
        return False


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback. It draws a bar on standard error if that is a terminal, else it writes plain lines."""
    if not sys.stderr.isatty():
        yield plain_progress()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(stage: str, done: int, total: int, note: str = "", /) -> None:
            bar.update(task, description=f"{stage}, {note}" if note else stage, completed=done, total=total)

        yield update


def say(line: str) -> None:
    """Print a line about the work itself on standard error. Options that it names are spelled as flags."""
    lines = _running.get()
    (lines.say if lines else _print_line)(_spell.get()(line))


def _print_line(line: str) -> None:
    ERR.print(line, markup=False, style="dim")


def bytes_text(size: float) -> str:
    """A size in bytes in readable form, such as 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def plain_table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def words(name: str) -> str:
    return name.replace("_", " ")
