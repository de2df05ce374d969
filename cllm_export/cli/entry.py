"""The command line with all its commands: errors become one message and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer

from cllm_export.cli import bench, build, calibrate, chat, demo, device, generate, train, verify
from cllm_export.cli.app import EXIT_DEFECT, EXIT_ERROR, app
from cllm_export.cli.show.console import ERR
from cllm_export.errors import CllmExportError

__all__ = ["bench", "build", "calibrate", "chat", "demo", "device", "generate", "main", "train", "verify"]


def main() -> None:
    """Run a command: errors become one message and an exit code, never a traceback."""
    debug = _take_debug_flag(sys.argv)
    if sys.stdout is None:
        _fail("standard output is closed: redirect it to a file, or to /dev/null", EXIT_ERROR)
    try:
        sys.exit(app(prog_name="cllm-export", standalone_mode=False))
    except typer.TyperException as error:
        _fail_usage(error)
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


def _take_debug_flag(argv: list[str]) -> bool:
    """Remove --debug from anywhere before a bare ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    argv[:end] = [argument for argument in argv[:end] if argument != "--debug"]
    return debug


def _fail_usage(error: Any) -> None:
    """Say what is wrong with a command line, in the form of all other errors. Without arguments, show the help."""
    if len(sys.argv) == 1:
        typer.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    see = f"; see {context.command_path} --help" if context else ""
    _fail(f"{text[:1].lower()}{text[1:]}{see}", error.exit_code)


def _fail(message: str, code: int, cause: BaseException | None = None) -> None:
    if cause is not None:
        traceback.print_exception(cause)
    ERR.print("[bold red]error:[/bold red]", end=" ")
    ERR.print(message, markup=False)
    sys.exit(code)
