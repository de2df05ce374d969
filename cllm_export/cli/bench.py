"""`bench` and `compare`: times on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.bundle.storage import check_report_path, write_json
from cllm_export.cli.app import app
from cllm_export.cli.options import (
    BlockSizeOption,
    BundleArgument,
    CheckpointOption,
    DraftModelOption,
    GuessesOption,
    LimitOption,
    MaxNewTokensOption,
    NGramOption,
    PromptsOption,
    ReportOption,
    SourcesOption,
    ThreadsOption,
    WindowOption,
    require_use,
)
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.decoding import show_bench, show_comparison
from cllm_export.errors import OptionError
from cllm_export.extras import needs_extra
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.request import METHODS, Method


@app.command()
def bench(
    bundle: BundleArgument,
    prompts: PromptsOption = None,
    checkpoint: CheckpointOption = None,
    method: Annotated[
        Method | None,
        typer.Option(
            "--method", help="Time this method and autoregressive alone; by default every method but lookahead."
        ),
    ] = None,
    block_size: BlockSizeOption = None,
    fill: SourcesOption = None,
    draft_model: DraftModelOption = None,
    window: WindowOption = None,
    ngram: NGramOption = None,
    guesses: GuessesOption = None,
    sweep: Annotated[
        str, typer.Option("--sweep", help="Further block sizes to time with method jacobi, such as 4,8,12.")
    ] = "",
    max_new_tokens: MaxNewTokensOption = 128,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Number of passes over the prompts; the report gives medians.")
    ] = 3,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: ReportOption = None,
) -> None:
    """Time every loop on real prompts, interleaved, and the forward at every block size."""
    from cllm_export.measure.bench import BenchOptions, run_bench

    if limit is not None and prompts is None:
        raise OptionError("--limit needs --prompts")
    require_use(draft_model, method or "speculative", fill)
    options = BenchOptions(
        methods=_methods_to_time(method, has_draft_model=draft_model is not None),
        block_size=block_size,
        lookahead={
            name: given
            for name, given in (("window", window), ("ngram", ngram), ("guesses", guesses))
            if given is not None
        },
        fill=fill,
        draft_model=draft_model,
        max_new_tokens=max_new_tokens,
        threads=threads,
        repeats=repeats,
        sweep=_parse_sizes(sweep),
    )
    opened = open_bundle(bundle)
    if as_json:
        check_report_path(as_json)
    given = read_prompts(prompts, limit=limit) if prompts else ()
    with progress_bar() as progress, needs_extra("export"):
        report = run_bench(opened, prompts=given, checkpoint=checkpoint, options=options, progress=progress)
    if as_json:
        write_json(as_json, report)
    show_bench(report)


@app.command()
def compare(
    bundles: Annotated[
        list[Path], typer.Argument(help="The bundles to compare, all of one model.", show_default=False)
    ],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A prompt file, in the format that `generate` takes.", show_default=False)
    ],
    block_sizes: Annotated[
        list[int] | None, typer.Option("--block-size", help="Block size n, in tokens; repeat the option for several.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Number of passes over the prompts; the report gives medians.")
    ] = 5,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: ReportOption = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", help="Write a plot of tokens per forward against time into this directory."),
    ] = None,
) -> None:
    """Say which of several bundles decodes fastest on this machine, and at which block size."""
    from cllm_export.cli.show.plots import check_plots, plot_trade_off
    from cllm_export.measure.compare import CompareOptions
    from cllm_export.measure.compare import compare as run

    if as_json:
        check_report_path(as_json)
    check_plots(plots)
    options = CompareOptions(
        sizes=tuple(block_sizes or ()), max_new_tokens=max_new_tokens, rounds=rounds, threads=threads
    )
    opened, given = [open_bundle(path) for path in bundles], read_prompts(prompts, limit=limit)
    with progress_bar() as progress:
        report = run(opened, given, options, progress=progress)
    if as_json:
        write_json(as_json, report)
    if plots:
        plot_trade_off(report["settings"], plots)
    show_comparison(report)


def _methods_to_time(method: Method | None, *, has_draft_model: bool) -> tuple[Method, ...]:
    """The baseline and the method asked for, else every loop: speculative decoding where a draft model is given."""
    from cllm_export.measure.bench import DEFAULT_METHODS

    if method:
        return (method,) if method == "autoregressive" else (method, "autoregressive")
    return METHODS if has_draft_model else DEFAULT_METHODS


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise OptionError(f"--sweep must be block sizes such as 4,8,12, got {text!r}") from None
