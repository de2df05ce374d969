"""`verify` and `inspect`."""

from __future__ import annotations

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.cli.app import EXIT_FAILED, command
from cllm_export.cli.before.arguments import check_bundle, check_checkpoint_or_adapter, check_plan, check_prompts
from cllm_export.cli.options import (
    BaseOption,
    BundleArgument,
    CheckpointOption,
    JsonOption,
    LimitOption,
    PromptsOption,
)
from cllm_export.cli.show.bundle import show_description, show_parity
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.report import show_report
from cllm_export.cli.signature import with_options
from cllm_export.errors import OptionError
from cllm_export.extras import needs_extra
from cllm_export.prompts import read_prompts
from cllm_export.verification.report import VerifyOptions, check_slots


@command("cllm-export verify my-bundle --checkpoint path/to/checkpoint")
@with_options(VerifyOptions)
def verify(
    bundle: BundleArgument,
    options: VerifyOptions,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a bundle lossless, write parity.json into it, and exit with 1 if it is not."""
    from cllm_export.verification.verify import verify as run

    if limit is not None and prompts is None:
        raise OptionError("limit needs prompts", fields=("limit", "prompts"))
    if opened := check_bundle("bundle", bundle, block_sizes=options.block_sizes):
        check_slots(opened, options)
    check_plan(bundle, options.provider, options.plan)
    check_checkpoint_or_adapter(checkpoint, base)
    check_prompts("prompts", prompts, limit=limit)
    with progress_bar() as progress, needs_extra("export"):
        parity = run(
            open_bundle(bundle),
            prompts=read_prompts(prompts, limit=limit) if prompts else (),
            checkpoint=checkpoint,
            base=base,
            options=options,
            progress=progress,
        )
    if as_json:
        typer.echo(parity.to_json())
    else:
        show_parity(parity)
    if not parity.passed:
        raise typer.Exit(EXIT_FAILED)


@command("cllm-export inspect my-bundle --json")
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Say what is in a bundle and in its plans, and what memory it needs."""
    from cllm_export.bundle.inspect import describe
    from cllm_export.tensorrt.plan_files import describe_plans

    opened = open_bundle(bundle)
    show_report(describe(opened) | {"plans": describe_plans(opened)}, show_description, as_json=as_json)
