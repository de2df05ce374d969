"""`plan`, `plan-memory` and `doctor`: what a device runs and needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.manifest import open_bundle
from cllm_export.cli.app import app
from cllm_export.cli.options import BlockSizeOption, BundleArgument
from cllm_export.cli.show.bundle import show_findings, show_memory
from cllm_export.cli.show.console import say
from cllm_export.cli.sizes import parse_size
from cllm_export.tensorrt.plan_files import Hardware


@app.command()
def plan(
    bundle: BundleArgument,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="Number of slots: prompts that are decoded at once; by default the bundle's."
        ),
    ] = None,
    block_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--block-size",
            help="Block size n, in tokens; repeat the option for several. By default 1 and the bundle's own.",
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", help="Number of prompt tokens that one forward reads; by default 128."),
    ] = None,
    extents: Annotated[
        list[int] | None,
        typer.Option(
            "--extent",
            help="KV rows that attention reads; repeat the option for several. By default 256, 512 and so on.",
        ),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", help="Scratch memory that the builder may use, such as 512MB; by default all."),
    ] = None,
    optimization_level: Annotated[
        int, typer.Option("--optimization-level", help="How long the builder looks for faster kernels, from 0 to 5.")
    ] = 3,
    hardware: Annotated[
        Hardware,
        typer.Option("--hardware", help="GPUs that the plan runs on; a wider choice leaves fewer fast kernels."),
    ] = "same",
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits", help="Keep the logits, which sampling, grammars and log-probabilities need."
        ),
    ] = True,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let weights stay in host memory, which is slower.")
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="Write a small plan without weights, which are read from the bundle when it is loaded.",
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Write a plan that later versions of TensorRT run too; it is larger and may be slower.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build the plan even if there is one already.")] = False,
) -> None:
    """Build a bundle's TensorRT plan for this machine. Needs a GPU, TensorRT and no torch."""
    from cllm_export.tensorrt.build_plan import PlanOptions, build_plan

    options = PlanOptions(
        batch_size=batch_size,
        block_sizes=tuple(block_sizes or ()),
        prefill_chunk=prefill_chunk,
        extents=tuple(extents or ()),
        workspace=parse_size(workspace, flag="--workspace") if workspace is not None else None,
        optimization_level=optimization_level,
        hardware=hardware,
        logits=logits,
        weight_streaming=weight_streaming,
        strip_weights=strip_weights,
        version_compatible=version_compatible,
    )
    typer.echo(f"wrote {build_plan(open_bundle(bundle), options, force=force, say=say).path}")


@app.command()
def plan_memory(
    bundle: BundleArgument,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Number format to plan for; by default the bundle's own.")
    ] = None,
    block_size: BlockSizeOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", help="Largest number of tokens of a prompt and its new tokens; by default the bundle's own."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="Number of slots: prompts that are decoded at once; by default the bundle's."
        ),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option("--prefill-chunk", help="Number of prompt tokens that one forward reads.")
    ] = 128,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Scratch memory that the builder may use, such as 512MB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what memory a device needs for a bundle and for building its plan, and how each figure is computed."""
    from cllm_export.tensorrt.memory import MemoryOptions, memory_figures

    options = MemoryOptions(
        precision=precision,
        block_size=block_size,
        max_length=max_length,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        workspace=parse_size(workspace, flag="--workspace") if workspace is not None else None,
    )
    figures = memory_figures(open_bundle(bundle), options)
    if as_json:
        typer.echo(json.dumps([vars(figure) for figure in figures], indent=2))
    else:
        show_memory(figures)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """Say what of the GPU stack is here, what is missing or mismatched, and what fixes it."""
    from cllm_export.tensorrt.doctor import examine, report

    findings = examine()
    if as_json:
        typer.echo(json.dumps(report(findings), indent=2))
    else:
        show_findings(findings, report(findings))
