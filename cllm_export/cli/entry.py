"""The start of the command line: errors become one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from cllm_export.cli.app import EXIT_DEFECT, EXIT_ERROR, Stopped, app
from cllm_export.cli.show.console import ERR
from cllm_export.errors import CllmExportError


def main() -> None:
    """Entry point of ``cllm-export``: errors become one message and an exit code, never a traceback."""
    debug = _take_debug_flag(sys.argv)
    if sys.stdout is None:
        _fail("standard output is closed: redirect it to a file, or to /dev/null", EXIT_ERROR)
    try:
        with _stopped_by_sigterm():
            app()
    except Stopped as stop:
        _end(stop)
    except CllmExportError as error:
        _fail(str(error), EXIT_ERROR, error if debug else None)
    except MemoryError as error:
        message = f"there is not enough memory{f' ({error})' if str(error) else ''}: ask for less, or free some"
        _fail(message, EXIT_ERROR, error if debug else None)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"the system refused: {error.strerror or error}{where}", EXIT_ERROR, error if debug else None)
    except Exception as error:
        message = (
            f"{type(error).__name__}: {error}; this is a defect of cllm-export: run again with --debug and report it"
        )
        _fail(message, EXIT_DEFECT, error if debug else None)


def _terminate(number: int, _frame: object) -> None:
    raise Stopped(signal.Signals(number))


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM stop the block, as Ctrl-C does. Only the main thread may say so; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(stop: Stopped) -> None:
    """End after a signal, with the exit code that a shell gives it. Where the output is closed, say nothing."""
    if stop.number == signal.SIGPIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(stop.exit_code)
    what = "interrupted" if stop.number == signal.SIGINT else "terminated"
    _fail(
        f"{what}: nothing half-written is left; the same command starts again, or goes on where it keeps its work",
        stop.exit_code,
    )


def _take_debug_flag(argv: list[str]) -> bool:
    """Remove --debug from anywhere before a bare ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    argv[:end] = [argument for argument in argv[:end] if argument != "--debug"]
    return debug


def _fail(message: str, code: int, cause: BaseException | None = None) -> None:
    if cause is not None:
        traceback.print_exception(cause)
    ERR.print("[bold red]error:[/bold red]", end=" ")
    ERR.print(message, markup=False)
    sys.exit(code)
