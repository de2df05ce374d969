"""`verify` and `inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.cli.app import EXIT_FAILED, app
from cllm_export.cli.options import (
    BaseOption,
    BundleArgument,
    CheckpointOption,
    LimitOption,
    MaxNewTokensOption,
    PromptsOption,
    ThreadsOption,
)
from cllm_export.cli.show.bundle import show_description, show_parity
from cllm_export.cli.show.console import progress_bar
from cllm_export.errors import OptionError
from cllm_export.extras import needs_extra
from cllm_export.prompts import read_prompts


@app.command()
def verify(
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    prompts: PromptsOption = None,
    block_sizes: Annotated[
        list[int] | None, typer.Option("--block-size", help="Block size n, in tokens; repeat the option for several.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--whole",
            help="Compare with the checkpoint layer by layer, or by decoding; by default whichever fits in memory.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Prove a bundle lossless, write parity.json into it, and exit with 1 if it is not."""
    from cllm_export.verification.report import VerifyOptions
    from cllm_export.verification.verify import verify as run

    if limit is not None and prompts is None:
        raise OptionError("--limit needs --prompts")
    options = VerifyOptions(
        max_new_tokens=max_new_tokens, block_sizes=tuple(block_sizes or ()), threads=threads, by_layer=by_layer
    )
    with progress_bar() as progress, needs_extra("export"):
        parity = run(
            open_bundle(bundle),
            prompts=read_prompts(prompts, limit=limit) if prompts else (),
            checkpoint=checkpoint,
            base=base,
            options=options,
            progress=progress,
        )
    show_parity(parity)
    if not parity.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def inspect(
    bundle: BundleArgument, as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
) -> None:
    """Say what is in a bundle and what memory it needs."""
    from cllm_export.bundle.inspect import describe

    description = describe(open_bundle(bundle))
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        show_description(description)
