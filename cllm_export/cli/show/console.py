"""Terminal output: tables, progress bars and colours. In a pipe the output is plain text without progress bars."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cllm_export.progress import Progress as ProgressCallback

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


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A progress callback that draws on standard error, but only if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def say(line: str) -> None:
    """Print a line about the work itself on standard error."""
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
