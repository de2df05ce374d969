"""`collect`, `tune` and `evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cllm_export.cli.app import EXIT_FAILED, app
from cllm_export.cli.before.arguments import check_counts, check_prompts, check_report, check_source
from cllm_export.cli.before.commands import check_collect, check_tune, check_tune_data
from cllm_export.cli.options import LimitOption, PromptFileOption, ThreadsOption
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.training import show_collection, show_evaluation, show_probe, show_tuning
from cllm_export.cli.signature import with_options
from cllm_export.evaluation.evaluate import EvaluateOptions
from cllm_export.evaluation.tasks.task import TaskName
from cllm_export.extras import needs_extra
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.model.options import LoraOptions
from cllm_export.training.options import TuneOptions

SourceArgument = Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face checkpoint.", show_default=False)]


@app.command()
@with_options(EvaluateOptions)
def evaluate(
    source: SourceArgument,
    data: Annotated[Path, typer.Option("--data", help="The task's data file, or a prompt file.", show_default=False)],
    options: EvaluateOptions,
    task: Annotated[
        TaskName | None,
        typer.Option("--task", help="The task, which says what the data is and how answers are scored."),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Instead of a score, estimate the speed-up to expect here, and what it would take."
        ),
    ] = False,
    parent: Annotated[
        Path | None,
        typer.Option("--parent", help="A second bundle or checkpoint to compare with, decoded in the same way."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report to this file as JSON.")
    ] = None,
) -> None:
    """Score a model on a task, with its decoding measures, or probe what decoding in parallel would bring."""
    from cllm_export.evaluation.command import run_evaluation, run_probe

    check_source("source", source, block_size=options.block_size)
    check_source("parent", parent)
    check_report("output", output)
    with progress_bar() as progress:
        if probe:
            report = run_probe(source, data, task, parent, options, output=output, progress=progress)
        else:
            report = run_evaluation(source, data, task, parent, options, output=output, progress=progress)
    (show_probe if probe else show_evaluation)(report)


@app.command()
@with_options(CollectOptions)
def collect(
    source: SourceArgument,
    prompts: PromptFileOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The collection to write, or to continue.")],
    options: CollectOptions,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Number of prompts that are decoded at once; by default 8.")
    ] = None,
    threads: ThreadsOption = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Device that a checkpoint runs on, such as cpu or cuda.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Decode prompts and keep every Jacobi state, for `tune`. Run it again to go on after an interruption."""
    check_counts(batch_size=batch_size, threads=threads)
    check_collect(source, prompts, output, options, device=device)
    with needs_extra("train"):
        from cllm_export.training.collection.collect import collect as run
        from cllm_export.training.collection.source import open_source

        opened = open_source(source, batch_size=batch_size, threads=threads, device=device)
        with progress_bar() as progress:
            collection = run(opened, prompts, output, options, progress=progress)
    if as_json:
        typer.echo(json.dumps(collection.manifest.summary, indent=2))
    else:
        show_collection(str(output), collection.manifest.summary or {})
    if not len(collection):
        raise typer.Exit(EXIT_FAILED)


@app.command()
@with_options(TuneOptions)
@with_options(LoraOptions, names={"rank": "lora_rank", "alpha": "lora_alpha"})
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help="A file of prompts with answers; if it has no answers, the model answers the prompts first.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.", show_default=False)],
    options: TuneOptions,
    lora: LoraOptions | None,
    trajectories: Annotated[
        Path | None,
        typer.Option("--trajectories", help="Train on this collection, which `collect` wrote, instead of the answers."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", help="A file of held-out prompts with answers; by default the last prompts of --prompts."
        ),
    ] = None,
    num_held_out: Annotated[int, typer.Option("--num-held-out", help="Number of held-out prompts.")] = 64,
    limit: LimitOption = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Number of CPU threads of each process.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier run.")] = False,
) -> None:
    """Turn a checkpoint into a CLLM, or a better one; start it with `accelerate launch` for several processes."""
    check_counts(num_held_out=num_held_out, threads=threads)
    check_tune(checkpoint, output, options, force=force, resume=resume)
    check_prompts("prompts", prompts, limit=limit)
    check_tune_data(trajectories, held_out, num_held_out)
    with needs_extra("train"):
        from cllm_export.training.command import run_tune

    with progress_bar() as progress:
        report = run_tune(
            checkpoint,
            prompts,
            output,
            replace(options, lora=lora),
            trajectories=trajectories,
            held_out=held_out,
            num_held_out=num_held_out,
            limit=limit,
            threads=threads,
            resume=resume,
            force=force,
            progress=progress,
        )
    if report is None:  # not the first of several processes
        return
    show_tuning(str(output), report)
    if report["stopped"] == "collapse":
        raise typer.Exit(EXIT_FAILED)
