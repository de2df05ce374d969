"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.cli.app import EXIT_FAILED, command
from cllm_export.cli.before.arguments import check_counts
from cllm_export.cli.before.commands import check_demo
from cllm_export.cli.options import BundleOutputOption, ForceOption, ThreadsOption, given
from cllm_export.extras import needs_extra


@command("cllm-export demo --example examples/text_to_sql --output demo-bundle")
def demo(
    example: Annotated[Path, given("--example", "A directory with `checkpoint/` and `prompts.jsonl`.", "Input")] = Path(
        "examples/text_to_sql"
    ),
    output: BundleOutputOption = Path("demo-bundle"),
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Build the example's bundle, verify it, decode a few prompts and print the speed table."""
    from cllm_export.cli.run_demo import run_demo

    check_demo(example, output, force=force)
    check_counts(threads=threads)
    with needs_extra("export"):
        if not run_demo(example, output, threads=threads, force=force):
            raise typer.Exit(EXIT_FAILED)
