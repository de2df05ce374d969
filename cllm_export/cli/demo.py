"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.cli.app import EXIT_FAILED, app
from cllm_export.cli.before.arguments import check_counts
from cllm_export.cli.before.commands import check_demo
from cllm_export.cli.options import ThreadsOption
from cllm_export.extras import needs_extra


@app.command()
def demo(
    example: Annotated[
        Path, typer.Option("--example", help="A directory with `checkpoint/` and `prompts.jsonl`.")
    ] = Path("examples/text_to_sql"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write the bundle to.")] = Path(
        "demo-bundle"
    ),
    threads: ThreadsOption = None,
) -> None:
    """Build the example's bundle, verify it, decode a few prompts and print the speed table."""
    from cllm_export.cli.run_demo import run_demo

    check_demo(example, output)
    check_counts(threads=threads)
    with needs_extra("export"):
        if not run_demo(example, output, threads=threads):
            raise typer.Exit(EXIT_FAILED)
