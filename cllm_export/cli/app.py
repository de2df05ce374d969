"""The command line's application. The other modules of this package add their commands to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from cllm_export import __version__
from cllm_export.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, NOTHING_SAVED
from cllm_export.cli.flags import Flag, with_flags, with_value
from cllm_export.cli.show.console import is_first_process, progress_lines, say, spelling
from cllm_export.cli.show.help import Command, write_sections
from cllm_export.cli.signature import flags_of_fields
from cllm_export.errors import CllmExportError
from cllm_export.progress import Terminated

Run = TypeVar("Run", bound=Callable[..., Any])

ORDER = (
    *("build", "import", "plan", "verify", "generate", "chat", "inspect", "bench"),
    *("calibrate", "convergence", "quantize"),
    *("evaluate", "collect", "tune", "plan-memory", "doctor", "trace", "demo"),
)
"""Order of commands in the help: those that most users need come first."""


EXIT_FAILED, EXIT_ERROR, EXIT_DEFECT, EXIT_CLOSED = 1, 2, 3, 141
EXIT_CODES = {
    0: "The command did what it was asked.",
    EXIT_FAILED: "It ran, but the result is bad: not verified, collapsed, or nothing collected.",
    EXIT_ERROR: "The command line, a file or the machine is not as needed; the message says how to go on.",
    EXIT_DEFECT: "A defect of cllm-export; please report it.",
    EXIT_INTERRUPTED: "Interrupted with Ctrl-C.",
    EXIT_CLOSED: "Whoever read the output closed it.",
    EXIT_TERMINATED: "Terminated by SIGTERM.",
}
"""Every exit code, and what it says."""


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Its errors name options by their flags, and the values that they were given."""
        arguments = list(ctx.args)

        def spell(text: str) -> str:
            running = ctx.invoked_subcommand
            return with_flags(CllmExportError(text), self._flags(running)) if running else text

        try:
            with spelling(spell), progress_lines():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
            raise SystemExit(EXIT_CLOSED) from None
        except typer.BadParameter as error:
            error.message = with_value(error, arguments)
            raise
        except CllmExportError as error:
            error.args = (with_flags(error, self._flags(ctx.invoked_subcommand)),)
            raise
        except KeyboardInterrupt as stop:
            if is_first_process():
                signal = "SIGTERM" if isinstance(stop, Terminated) else "SIGINT"
                saved = "; ".join(getattr(stop, "__notes__", [])) or NOTHING_SAVED
                say(f"stopped by {signal}: {spell(saved)}")
            raise SystemExit(EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED) from None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_sections(self, ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].help or "") for name in self.list_commands(ctx)])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def _flags(self, running: str) -> dict[str, Flag]:
        """Flags by field, of the running command and of all others, because advice may name their options."""
        flags: dict[str, Flag] = {}
        for name in sorted(self.commands, key=lambda name: (name == running, -ORDER.index(name))):
            flags |= _flags_of(self.commands[name])
        arguments = {given.name for given in self.commands[running].params if given.param_type_name == "argument"}
        return {name: flag for name, flag in flags.items() if name not in arguments}


def _flags_of(command: Any) -> dict[str, Flag]:
    flags = {
        given.name: Flag(on=given.opts[0], off=next(iter(given.secondary_opts), None), is_switch=given.is_flag)
        for given in command.params
        if given.param_type_name == "option"
    }
    spelled = {flag.on: flag for flag in flags.values()}
    others = flags_of_fields(command.callback)
    return {field: spelled.get(flag, Flag(on=flag)) for field, flag in others.items()} | flags


app = typer.Typer(
    name="cllm-export",
    cls=_Commands,
    help="Export Consistency LLMs and decode them in parallel. "
    "At every fixed block size the tokens are equal to those of autoregressive decoding.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def command(example: str, *, name: str | None = None) -> Callable[[Run], Run]:
    """Add a function to the application as a command.

    Args:
        example: a command line that the help shows.
        name: the command's name, if it is not that of the function.
    """
    return app.command(name, cls=Command, epilog=example)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the command line.")
    ] = False,
) -> None:
    """Export Consistency LLMs and decode them in parallel."""
