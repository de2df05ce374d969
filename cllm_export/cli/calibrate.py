"""`calibrate`, `convergence` and `quantize`."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.calibration.calibrate import CalibrateOptions
from cllm_export.calibration.search.budget import FitOptions
from cllm_export.calibration.search.fit import Budget
from cllm_export.calibration.search.measured import HeldOutOptions
from cllm_export.checks import parse_share
from cllm_export.cli.app import command
from cllm_export.cli.before.arguments import check_bundle, check_prompts, check_report, check_scales_output, check_text
from cllm_export.cli.before.commands import check_quantize
from cllm_export.cli.options import (
    BundleArgument,
    BundleOutputOption,
    ForceOption,
    JsonOption,
    LimitOption,
    PromptFileOption,
    ReportOption,
    given,
)
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.report import show_report
from cllm_export.cli.signature import with_options
from cllm_export.errors import about

SHARES = {name: partial(parse_share, name=name) for name in (field.name for field in fields(Budget))}


@command(
    """cllm-export calibrate my-bundle --prompts prompts.jsonl \\
    --output scales.safetensors"""
)
@with_options(CalibrateOptions)
def calibrate(
    bundle: BundleArgument,
    prompts: PromptFileOption,
    output: Annotated[Path, given("--output", "The scales file to write.", "Output", "-o")],
    options: CalibrateOptions,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """See what the linear layers see while a bundle decodes, for `build --scales`. Run it again to go on."""
    from cllm_export.calibration.calibrate import calibrate as run
    from cllm_export.cli.show.calibration import show_calibration

    check_bundle("bundle", bundle, block_sizes=[options.block_size])
    check_prompts("prompts", prompts, limit=options.limit)
    check_scales_output(output, force=force)
    with progress_bar() as progress:
        report = run(open_bundle(bundle), prompts, output, options, force=force, progress=progress).to_dict()
    show_report(report, show_calibration, as_json=as_json)


@command(
    """cllm-export convergence int8-bundle --against my-bundle \\
    --prompts held-out.jsonl"""
)
@with_options(HeldOutOptions)
def convergence(
    bundles: Annotated[list[Path], typer.Argument(help="The quantised bundles to measure.", show_default=False)],
    against: Annotated[Path, given("--against", "The unquantised bundle to compare with.", "Input")],
    prompts: Annotated[
        Path, given("--prompts", "A file of held-out prompts; answers in it are used for scores.", "Input")
    ],
    options: HeldOutOptions,
    limit: LimitOption = None,
    output: ReportOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what quantised bundles lose: agreement, perplexity, texts, scores, tokens per forward, flips by stage."""
    from cllm_export.calibration.search.convergence import measure_convergence
    from cllm_export.cli.show.calibration import show_convergence
    from cllm_export.evaluation.tasks.questions import read_questions

    check_bundle("against", against, block_sizes=[options.block_size])
    check_prompts("prompts", prompts, limit=limit)
    check_report("output", output, force=force)
    check_text(options.text)
    opened, candidates = open_bundle(against), [open_bundle(path) for path in bundles]
    questions = read_questions(prompts, limit=limit)
    with progress_bar() as progress:
        report = measure_convergence(opened, candidates, questions, options, progress=progress)
    show_report(report, show_convergence, as_json=as_json, output=output)


@command(
    """cllm-export quantize path/to/checkpoint --against my-bundle \\
    --prompts held-out.jsonl --precision int8-dynamic --output int8-bundle"""
)
@with_options(FitOptions, names={"engine": "quantize_for", "schemes": "precision", "always_rank": "sensitivity"})
@with_options(Budget, parse=SHARES)
@with_options(HeldOutOptions)
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    against: Annotated[Path, given("--against", "The unquantised fp32 bundle of this checkpoint.", "Input")],
    prompts: Annotated[Path, given("--prompts", "A file of held-out prompts, on which the loss is measured.", "Input")],
    output: BundleOutputOption,
    options: FitOptions,
    budget: Budget,
    held_out: HeldOutOptions,
    limit: LimitOption = None,
    plots: Annotated[Path | None, given("--plots", "Directory for a plot of the sensitivity.", "Output")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantise as many layers as a budget allows, choose the fastest of several precisions, and say why."""
    from cllm_export.calibration.search.budget import quantize as run
    from cllm_export.cli.show.calibration import show_choice
    from cllm_export.cli.show.plots import SENSITIVITY, TRADE_OFF, check_plots, plot_choice
    from cllm_export.evaluation.tasks.questions import read_questions

    options = replace(options, budget=budget, held_out=held_out, always_rank=options.always_rank or plots is not None)
    check_quantize(checkpoint, against, output, options, force=force)
    check_prompts("prompts", prompts, limit=limit)
    with about("plots"):
        check_plots(plots, SENSITIVITY, TRADE_OFF, force=force)
    questions = read_questions(prompts, limit=limit)
    with progress_bar() as progress:
        chosen = run(checkpoint, open_bundle(against), questions, output, options, force=force, progress=progress)
    report = chosen.to_dict()
    show_report(report, partial(show_choice, str(output)), as_json=as_json)
    if plots:
        plot_choice(report, plots)
