"""`calibrate`, `convergence` and `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.bundle.quantization import SCHEME_NAMES
from cllm_export.bundle.storage import check_report_path, write_json
from cllm_export.cli.app import app
from cllm_export.cli.flags import names_replaced
from cllm_export.cli.options import (
    BlockSizeOption,
    BundleArgument,
    FillOption,
    LimitOption,
    MaxNewTokensOption,
    QuantizeForOption,
    ReportOption,
    ThreadsOption,
)
from cllm_export.cli.show.console import progress_bar


@app.command()
def calibrate(
    bundle: BundleArgument,
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A prompt file, in the format that `generate` takes.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The scales file to write.", show_default=False)],
    mix: Annotated[
        float,
        typer.Option(
            "--mix", help="Share of the observed rows, 0 to 1, that come from block states; the rest is clean text."
        ),
    ] = 0.5,
    num_rows: Annotated[int, typer.Option("--rows", help="Largest number of rows to observe.")] = 16384,
    gram: Annotated[
        bool, typer.Option("--gram", help="Write Gram matrices too, which GPTQ needs; the file becomes large.")
    ] = False,
    block_size: BlockSizeOption = None,
    fill: FillOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random choice of rows, and of random fills.")] = 0,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing scales file.")] = False,
    as_json: ReportOption = None,
) -> None:
    """See what the linear layers see while a bundle decodes, for `build --scales`. Run it again to go on."""
    from cllm_export.calibration.calibrate import CalibrateOptions
    from cllm_export.calibration.calibrate import calibrate as run
    from cllm_export.cli.show.calibration import show_calibration

    options = CalibrateOptions(
        mix=mix,
        num_rows=num_rows,
        gram=gram,
        block_size=block_size,
        fill=fill,
        seed=seed,
        max_new_tokens=max_new_tokens,
        limit=limit,
        threads=threads,
    )
    with progress_bar() as progress:
        report = run(open_bundle(bundle), prompts, output, options, force=force, progress=progress).to_dict()
    if as_json:
        write_json(as_json, report)
    show_calibration(report)


@app.command()
def convergence(
    bundles: Annotated[list[Path], typer.Argument(help="The quantised bundles to measure.", show_default=False)],
    against: Annotated[
        Path, typer.Option("--against", help="The unquantised bundle to compare with.", show_default=False)
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts", help="A file of held-out prompts; answers in it are used for scores.", show_default=False
        ),
    ],
    block_size: BlockSizeOption = None,
    fill: FillOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: ReportOption = None,
) -> None:
    """Say what quantised bundles lose: tokens per forward, flips by stage of convergence, texts, scores, perplexity."""
    from cllm_export.calibration.search.convergence import measure_convergence
    from cllm_export.calibration.search.measured import HeldOutOptions
    from cllm_export.cli.show.calibration import show_convergence
    from cllm_export.evaluation.tasks.questions import read_questions

    if as_json:
        check_report_path(as_json)
    options = HeldOutOptions(block_size=block_size, fill=fill, max_new_tokens=max_new_tokens, threads=threads)
    opened, candidates = open_bundle(against), [open_bundle(path) for path in bundles]
    questions = read_questions(prompts, limit=limit)
    with progress_bar() as progress:
        report = measure_convergence(opened, candidates, questions, options, progress=progress)
    if as_json:
        write_json(as_json, report)
    show_convergence(report)


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    against: Annotated[
        Path, typer.Option("--against", help="The unquantised fp32 bundle of this checkpoint.", show_default=False)
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts", help="A file of held-out prompts, on which the loss is measured.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The directory to write the bundle to.", show_default=False)
    ],
    precision: Annotated[
        list[str],
        typer.Option(
            "--precision",
            metavar="|".join(SCHEME_NAMES),
            help="How linear layers are quantised; repeat the option to choose the fastest of several here.",
        ),
    ],
    max_tpf_loss: Annotated[
        str,
        typer.Option("--max-tpf-loss", help="Largest share of the tokens per forward that may be lost, such as 3%."),
    ] = "3%",
    max_quality_loss: Annotated[
        str | None,
        typer.Option(
            "--max-quality-loss",
            help="Largest share of the score that may be lost; without answers, the score is the share of equal texts.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="For int4: how many input channels share a scale: 32, 64 or 128."),
    ] = None,
    quantize_for: QuantizeForOption = None,
    scales: Annotated[Path | None, typer.Option("--scales", help="The scales file that `calibrate` wrote.")] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure the sensitivity of every layer, even if the budget holds with all layers quantised.",
        ),
    ] = False,
    block_size: BlockSizeOption = None,
    fill: FillOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: ReportOption = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write a plot of the sensitivity into this directory.")
    ] = None,
) -> None:
    """Quantise as many layers as a budget allows, choose the fastest of several precisions, and say why."""
    from cllm_export.calibration.search.budget import FitOptions, parse_schemes
    from cllm_export.calibration.search.budget import quantize as run
    from cllm_export.calibration.search.fit import Budget, parse_share
    from cllm_export.calibration.search.measured import HeldOutOptions
    from cllm_export.cli.show.calibration import show_choice
    from cllm_export.cli.show.plots import check_plots, plot_choice
    from cllm_export.evaluation.tasks.questions import read_questions

    if as_json:
        check_report_path(as_json)
    check_plots(plots)
    with names_replaced({"schemes": "precision", "engine": "quantize_for"}):
        options = FitOptions(
            schemes=parse_schemes(precision),
            budget=Budget(
                tpf=parse_share("--max-tpf-loss", max_tpf_loss),
                quality=None if max_quality_loss is None else parse_share("--max-quality-loss", max_quality_loss),
            ),
            group_size=group_size,
            engine=quantize_for,
            scales=scales,
            always_rank=sensitivity or plots is not None,
            held_out=HeldOutOptions(block_size=block_size, fill=fill, max_new_tokens=max_new_tokens, threads=threads),
        )
    questions = read_questions(prompts, limit=limit)
    with progress_bar() as progress:
        chosen = run(checkpoint, open_bundle(against), questions, output, options, force=force, progress=progress)
    report = chosen.to_dict()
    if as_json:
        write_json(as_json, report)
    if plots:
        plot_choice(report, plots)
    show_choice(str(output), report)
