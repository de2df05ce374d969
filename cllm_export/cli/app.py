"""The command line's application; each module beside it adds its commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cllm_export import __version__

ORDER = (
    *("build", "plan", "verify", "generate", "inspect", "bench"),
    *("calibrate", "convergence", "quantize", "compare"),
    *("evaluate", "collect", "tune", "plan-memory", "doctor", "trace", "demo"),
)
"""As the help lists them: what most users need first."""


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


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
