"""`collect`, `tune` and `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm_export.bundle.manifest import FillName, Loop
from cllm_export.cli.app import EXIT_FAILED, app
from cllm_export.cli.options import BlockSizeOption, FillOption, LimitOption, ThreadsOption
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.training import show_collection, show_evaluation, show_probe, show_tuning
from cllm_export.errors import OptionError
from cllm_export.evaluation.tasks.task import TaskName
from cllm_export.extras import needs_extra
from cllm_export.runtime.decoding.request import JacobiMethod
from cllm_export.training import MixedPrecision, Objective, OptimizerName

if TYPE_CHECKING:
    from cllm_export.training.model.lora import LoraOptions


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face directory.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="The task's data file, or a prompt file.", show_default=False)],
    task: Annotated[TaskName | None, typer.Option("--task", help="What the data is, and how it is scored.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Tell instead what speed-up to expect here, and what it would take.")
    ] = False,
    parent: Annotated[
        Path | None, typer.Option("--parent", help="A bundle or checkpoint to set beside it, decoded alike.")
    ] = None,
    method: Annotated[
        JacobiMethod | None, typer.Option("--method", help="By default the loop the model was trained with.")
    ] = None,
    block_size: BlockSizeOption = None,
    fill: FillOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="New tokens a prompt, at most; by default the task's.")
    ] = None,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report here as JSON.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model writes, sandboxed: humaneval only.")
    ] = False,
) -> None:
    """Score a model on a task, with its decoding measures, or probe what decoding in parallel would bring."""
    from cllm_export.evaluation.command import run_evaluation, run_probe
    from cllm_export.evaluation.evaluate import EvaluateOptions

    options = EvaluateOptions(
        method=method,
        block_size=block_size,
        fill=fill,
        max_new_tokens=max_new_tokens,
        limit=limit,
        threads=threads,
        allow_code_execution=allow_code_execution,
    )
    with progress_bar() as progress:
        if probe:
            report = run_probe(source, data, task, parent, options, output=output, progress=progress)
        else:
            report = run_evaluation(source, data, task, parent, options, output=output, progress=progress)
    (show_probe if probe else show_evaluation)(report)


@app.command()
def collect(
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face directory.", show_default=False)],
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt file, as of `generate`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The collection to write, or to go on with.")],
    method: Annotated[
        JacobiMethod | None, typer.Option("--method", help="By default the loop the model was trained with.")
    ] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", help="n; by default the model's own.")] = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill; likewise.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompt fill; each prompt's own comes of it.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="New tokens a prompt; by default whatever fits.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Prompts at once; by default 8.")] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Prompts a shard, which is saved whole.")] = 1000,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    device: Annotated[str | None, typer.Option("--device", help="Of a checkpoint: cpu, cuda, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
) -> None:
    """Decode prompts and keep every Jacobi state, for `tune`. Run it again to go on after an interruption."""
    with needs_extra("train"):
        from cllm_export.training.collection.collect import CollectOptions, check_collection_output
        from cllm_export.training.collection.collect import collect as run
        from cllm_export.training.collection.source import open_source

        options = CollectOptions(
            method=method,
            block_size=block_size,
            fill=fill,
            seed=seed,
            max_new_tokens=max_new_tokens,
            shard_size=shard_size,
            limit=limit,
        )
        check_collection_output(output)
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
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts", help="Prompts with answers; without, the model answers them first.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.", show_default=False)],
    trajectories: Annotated[
        Path | None, typer.Option("--trajectories", help="What `collect` wrote: train on it instead of the answers.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="Prompts with answers to measure on; by default the last ones.")
    ] = None,
    num_held_out: Annotated[int, typer.Option("--num-held-out", help="How many to measure on.")] = 64,
    limit: LimitOption = None,
    objective: Annotated[
        Objective, typer.Option("--objective", help="autoregressive is ordinary fine-tuning, as a control.")
    ] = "packed",
    block_sizes: Annotated[
        list[int] | None,
        typer.Option("--block-size", help="n; 16 by default. Several mix; the first is to be deployed."),
    ] = None,
    loop: Annotated[Loop, typer.Option("--loop", help="The loop that will be deployed.")] = "sliding",
    fill: Annotated[FillName, typer.Option("--fill", help="The fill that will be deployed.")] = "pad",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Minutes of training, instead of steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples a forward and process.")] = 32,
    gradient_accumulation: Annotated[int, typer.Option("--gradient-accumulation", help="Forwards a step.")] = 1,
    num_windows: Annotated[int, typer.Option("--num-windows", help="Noisy states of a sample in a forward.")] = 6,
    autoregressive_weight: Annotated[
        float, typer.Option("--autoregressive-weight", help="Of the ordinary loss: too little, and models collapse.")
    ] = 1.0,
    distance_weight: Annotated[
        float, typer.Option("--distance-weight", help="Below 1: guesses count less, the further they are ahead.")
    ] = 1.0,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="Of the ordinary loss.")] = 0.0,
    optimizer: Annotated[OptimizerName, typer.Option("--optimizer", help="muon is for small models.")] = "adamw",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak, of adamw.")] = 2e-5,
    matrix_learning_rate: Annotated[float, typer.Option("--matrix-learning-rate", help="Peak, of muon.")] = 0.02,
    decay: Annotated[float, typer.Option("--decay", help="Share of the run over which it falls to zero.")] = 0.6,
    mixed_precision: Annotated[MixedPrecision, typer.Option("--mixed-precision", help="As accelerate's.")] = "no",
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Train adapters; merged when saved.")] = None,
    lora_alpha: Annotated[float | None, typer.Option("--lora-alpha", help="By default twice the rank.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Prompt and answer, in tokens.")] = None,
    evaluate_every: Annotated[
        float, typer.Option("--evaluate-every", help="Share of the run between held-out decodes, and saves.")
    ] = 0.1,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many held-out decodes without progress.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of order and states.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of each process.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run's output.")] = False,
) -> None:
    """Turn a checkpoint into a CLLM, or a better one; start it with `accelerate launch` for several processes."""
    with needs_extra("train"):
        from cllm_export.training.command import run_tune
        from cllm_export.training.tune_options import TuneOptions

    options = TuneOptions(
        objective=objective,
        block_sizes=tuple(block_sizes or (16,)),
        loop=loop,
        fill=fill,
        num_windows=num_windows,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        autoregressive_weight=autoregressive_weight,
        distance_weight=distance_weight,
        label_smoothing=label_smoothing,
        optimizer=optimizer,
        learning_rate=learning_rate,
        matrix_learning_rate=matrix_learning_rate,
        decay=decay,
        max_length=max_length,
        mixed_precision=mixed_precision,
        lora=_lora_options(lora_rank, lora_alpha),
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        evaluate_every=evaluate_every,
        patience=patience,
    )
    with progress_bar() as progress:
        report = run_tune(
            checkpoint,
            prompts,
            output,
            options,
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


def _lora_options(rank: int | None, alpha: float | None) -> LoraOptions | None:
    from cllm_export.training.model.lora import LoraOptions

    if rank is None:
        if alpha is not None:
            raise OptionError("--lora-alpha needs --lora-rank")
        return None
    return LoraOptions(rank=rank, alpha=2 * rank if alpha is None else alpha)
