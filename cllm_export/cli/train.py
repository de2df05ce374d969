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
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face checkpoint.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="The task's data file, or a prompt file.", show_default=False)],
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
    method: Annotated[
        JacobiMethod | None,
        typer.Option("--method", help="The decoding method; by default the loop that the model was trained with."),
    ] = None,
    block_size: BlockSizeOption = None,
    fill: FillOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Largest number of new tokens for each prompt; by default the task's."
        ),
    ] = None,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report to this file as JSON.")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run the code that the model writes, in a sandbox. Only humaneval needs it."
        ),
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
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face checkpoint.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A prompt file, in the format that `generate` takes.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The collection to write, or to continue.")],
    method: Annotated[
        JacobiMethod | None,
        typer.Option("--method", help="The decoding method; by default the loop that the model was trained with."),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="Block size n, in tokens; by default the model's own.")
    ] = None,
    fill: Annotated[
        FillName | None,
        typer.Option("--fill", help="How guesses are first filled and refilled; by default as the model was trained."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the prompt fill, from which each prompt gets its own.")
    ] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Largest number of new tokens for each prompt; by default as many as fit."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Number of prompts that are decoded at once; by default 8.")
    ] = None,
    shard_size: Annotated[
        int, typer.Option("--shard-size", help="Number of prompts in a shard; each shard is saved when it is complete.")
    ] = 1000,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Device that a checkpoint runs on, such as cpu or cuda.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
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
            "--prompts",
            help="A file of prompts with answers; if it has no answers, the model answers the prompts first.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.", show_default=False)],
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
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective", help="The training objective; autoregressive is ordinary fine-tuning, for comparison."
        ),
    ] = "packed",
    block_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--block-size",
            help="Block size n, in tokens, 16 by default. Repeat the option to mix several; the first is deployed.",
        ),
    ] = None,
    loop: Annotated[Loop, typer.Option("--loop", help="The loop that the tuned model will decode with.")] = "sliding",
    fill: Annotated[FillName, typer.Option("--fill", help="The fill that the tuned model will decode with.")] = "pad",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Number of optimiser steps; give either this or --minutes.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Minutes of training, without held-out decoding; give either this or --steps."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Number of samples in a forward, for each process.")
    ] = 32,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", help="Number of forwards in an optimiser step.")
    ] = 1,
    num_windows: Annotated[
        int,
        typer.Option(
            "--num-windows", help="Number of noisy states of each sample in a forward, for the packed objective."
        ),
    ] = 6,
    autoregressive_weight: Annotated[
        float,
        typer.Option(
            "--autoregressive-weight",
            help="Weight of the autoregressive loss beside the consistency loss; with too little, models collapse.",
        ),
    ] = 1.0,
    distance_weight: Annotated[
        float,
        typer.Option(
            "--distance-weight",
            help="Factor on a guess's weight for each place that it stands behind the first wrong one, 0 to 1.",
        ),
    ] = 1.0,
    label_smoothing: Annotated[
        float, typer.Option("--label-smoothing", help="Label smoothing of the autoregressive loss, 0 to 1.")
    ] = 0.0,
    optimizer: Annotated[
        OptimizerName, typer.Option("--optimizer", help="The optimiser; muon is for small models.")
    ] = "adamw",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak learning rate of adamw.")] = 2e-5,
    matrix_learning_rate: Annotated[
        float, typer.Option("--matrix-learning-rate", help="Peak learning rate of muon, which trains the matrices.")
    ] = 0.02,
    decay: Annotated[
        float, typer.Option("--decay", help="Share of the run, at its end, over which the learning rate falls to zero.")
    ] = 0.6,
    mixed_precision: Annotated[
        MixedPrecision, typer.Option("--mixed-precision", help="The dtype of mixed precision, as in accelerate.")
    ] = "no",
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank", help="Train LoRA adapters of this rank, which are merged when the checkpoint is saved."
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Alpha of the LoRA adapters; by default twice the rank.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in the backward pass: less memory, a third more time.",
        ),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", help="Largest number of tokens of prompt and answer; longer samples are left out."
        ),
    ] = None,
    evaluate_every: Annotated[
        float,
        typer.Option(
            "--evaluate-every",
            help="Share of the run after which held-out prompts are decoded and the state is saved, 0 to 1.",
        ),
    ] = 0.1,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after this many held-out decodes without progress.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the order of samples and of their noisy states.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", help="Number of CPU threads of each process.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier run.")] = False,
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
