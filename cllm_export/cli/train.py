"""`collect`, `tune` and `evaluate`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cllm_export.cli.app import EXIT_FAILED, command
from cllm_export.cli.before.arguments import check_counts, check_prompts, check_report, check_source, check_text
from cllm_export.cli.before.commands import check_collect, check_tune, check_tune_data
from cllm_export.cli.options import (
    ForceOption,
    JsonOption,
    LimitOption,
    PromptFileOption,
    ReportOption,
    ThreadsOption,
    given,
)
from cllm_export.cli.show.console import progress_bar, say
from cllm_export.cli.show.report import show_report
from cllm_export.cli.show.training import show_collection, show_evaluation, show_probe, show_tuning
from cllm_export.cli.signature import with_options
from cllm_export.evaluation.evaluate import EvaluateOptions
from cllm_export.evaluation.tasks.task import TaskName
from cllm_export.evaluation.verdict import UNKNOWN
from cllm_export.extras import needs_extra
from cllm_export.progress import Voice
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.model.options import LoraOptions
from cllm_export.training.options import TuneOptions

SourceArgument = Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face checkpoint.", show_default=False)]


@command("cllm-export evaluate my-bundle --task prompts --data held-out.jsonl")
@with_options(EvaluateOptions)
def evaluate(
    source: SourceArgument,
    data: Annotated[Path, given("--data", "The task's data file, or a prompt file.", "Input")],
    options: EvaluateOptions,
    task: Annotated[
        TaskName | None,
        given("--task", "The task, which says what the data is and how answers are scored.", "Input"),
    ] = None,
    probe: Annotated[
        bool,
        given("--probe", "Instead of a score, estimate the speed-up to expect here, and what it would take.", "Input"),
    ] = False,
    parent: Annotated[
        Path | None,
        given("--parent", "A second bundle or checkpoint to compare with, decoded in the same way.", "Input"),
    ] = None,
    output: ReportOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on a task, with its decoding measures, or probe what decoding in parallel would bring."""
    from cllm_export.evaluation.command import run_evaluation, run_probe

    check_source("source", source, block_size=options.block_size)
    check_source("parent", parent)
    check_report("output", output, force=force)
    check_text(options.text)
    with progress_bar() as progress:
        report = (run_probe if probe else run_evaluation)(source, data, task, parent, options, progress=progress)
    show_report(report, show_probe if probe else show_evaluation, as_json=as_json, output=output)
    if probe and report["verdict"]["readiness"] == UNKNOWN:
        raise typer.Exit(EXIT_FAILED)


@command("cllm-export collect my-bundle --prompts prompts.jsonl --output trajectories")
@with_options(CollectOptions)
def collect(
    source: SourceArgument,
    prompts: PromptFileOption,
    output: Annotated[Path, given("--output", "The collection to write, or to continue.", "Output", "-o")],
    options: CollectOptions,
    batch_size: Annotated[
        int | None, given("--batch-size", "Number of prompts that are decoded at once.", "Machine", default="8")
    ] = None,
    threads: ThreadsOption = None,
    device: Annotated[
        str | None, given("--device", "Device that a checkpoint runs on, such as cpu or cuda.", "Machine")
    ] = None,
    as_json: JsonOption = False,
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
    show_report(collection.manifest.summary or {}, partial(show_collection, str(output)), as_json=as_json)
    if not len(collection):
        raise typer.Exit(EXIT_FAILED)


@command(
    """cllm-export tune path/to/checkpoint --prompts prompts.jsonl \\
    --output my-cllm --minutes 60"""
)
@with_options(TuneOptions)
@with_options(LoraOptions, names={"rank": "lora_rank", "alpha": "lora_alpha"})
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    prompts: Annotated[
        Path,
        given(
            "--prompts",
            "A file of prompts with answers; if it has no answers, the model answers the prompts first.",
            "Input",
        ),
    ],
    output: Annotated[Path, given("--output", "The checkpoint to write.", "Output", "-o")],
    options: TuneOptions,
    lora: LoraOptions | None,
    trajectories: Annotated[
        Path | None,
        given("--trajectories", "Train on this collection, which `collect` wrote, instead of the answers.", "Input"),
    ] = None,
    held_out: Annotated[
        Path | None,
        given(
            "--held-out",
            "A file of held-out prompts with answers.",
            "Input",
            default="the last prompts of --prompts",
        ),
    ] = None,
    num_held_out: Annotated[int, given("--num-held-out", "Number of held-out prompts.", "Input")] = 64,
    limit: LimitOption = None,
    threads: Annotated[int | None, given("--threads", "Number of CPU threads of each process.", "Machine")] = None,
    resume: Annotated[bool, given("--resume", "Continue an interrupted run.", "Output")] = False,
    force: ForceOption = False,
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
            voice=Voice(progress=progress, say=say),
        )
    if report is None:  # not the first of several processes
        return
    show_tuning(str(output), report)
    if report["stopped"] == "collapse":
        raise typer.Exit(EXIT_FAILED)
