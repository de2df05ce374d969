"""The command line's application. The other modules of this package add their commands to it."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cllm_export import __version__
from cllm_export.cli.flags import Flag, with_flags, with_value
from cllm_export.cli.signature import flags_of_fields
from cllm_export.errors import CllmExportError

ORDER = (
    *("build", "plan", "verify", "generate", "inspect", "bench"),
    *("calibrate", "convergence", "quantize"),
    *("evaluate", "collect", "tune", "plan-memory", "doctor", "trace", "demo"),
)
"""Order of commands in the help: those that most users need come first."""


class Stopped(BaseException):
    """A signal ended the command: SIGINT, SIGTERM, or SIGPIPE where nobody reads the output any more.

    It is no Exception, so that a block that handles those does not stop it. Blocks that clean up see it.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
        self.exit_code = 128 + number


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Its errors name options by their flags, and the values that they were given."""
        arguments = list(ctx.args)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
        except BrokenPipeError:
            raise Stopped(signal.SIGPIPE) from None
        except typer.BadParameter as error:
            error.message = with_value(error, arguments)
            raise
        except CllmExportError as error:
            error.args = (with_flags(error, self._flags(ctx.invoked_subcommand)),)
            raise

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
    add_completion=False,
    pretty_exceptions_enable=False,
)


EXIT_FAILED, EXIT_ERROR, EXIT_DEFECT = 1, 2, 3


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
