"""`bench`: times on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import GREEDY_GRAPH, open_bundle
from cllm_export.bundle.storage import write_json
from cllm_export.checks import option_specs
from cllm_export.cli.app import app
from cllm_export.cli.before.arguments import check_bundle, check_checkpoint_or_adapter, check_prompts, check_report
from cllm_export.cli.options import CheckpointOption, LimitOption, PromptsOption, ReportOption
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.decoding import show_bench
from cllm_export.cli.signature import with_options
from cllm_export.errors import OptionError, about
from cllm_export.extras import needs_extra
from cllm_export.measure.options import BenchOptions
from cllm_export.prompts import read_prompts


def _parse_methods(names: list[str]) -> tuple[str, ...]:
    """Methods as given. The options class checks them."""
    return tuple(names)


@app.command()
@with_options(
    BenchOptions,
    parse={"methods": _parse_methods},
    metavars={"methods": "|".join(option_specs(BenchOptions)["methods"].choices), "proposer": "SOURCES"},
)
def bench(
    bundles: Annotated[
        list[Path], typer.Argument(help="One bundle, or several of one model to compare.", show_default=False)
    ],
    options: BenchOptions,
    prompts: PromptsOption = None,
    checkpoint: CheckpointOption = None,
    limit: LimitOption = None,
    as_json: ReportOption = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", help="Directory for a plot of tokens per forward against the time of a forward."),
    ] = None,
) -> None:
    """Time methods and block sizes of one or several bundles on real prompts; say what is fastest on this machine."""
    from cllm_export.cli.show.plots import check_plots, plot_trade_off
    from cllm_export.measure.bench import run_bench

    if limit is not None and prompts is None:
        raise OptionError("limit needs prompts", fields=("limit", "prompts"))
    if len(bundles) > 1 and prompts is None:
        raise OptionError(
            "several bundles are compared on prompts: give prompts, for drafts of random tokens tell nothing",
            fields=("prompts",),
        )
    opened = [open_bundle(path) for path in bundles]
    check_bundle("draft_model", options.draft_model)
    check_bundle("bundles", bundles[0], block_sizes=options.block_sizes)
    check_prompts("prompts", prompts, limit=limit)
    check_checkpoint_or_adapter(checkpoint)
    check_report("as_json", as_json)
    with about("plots"):
        check_plots(plots)
    if plots and opened[0].manifest.graphs[GREEDY_GRAPH].fixed_shapes:
        raise OptionError(f"plots are of several block sizes, and {opened[0].path} is pinned to one", fields=("plots",))
    given = read_prompts(prompts, limit=limit) if prompts else ()
    with progress_bar() as progress, needs_extra("export"):
        report = run_bench(opened, prompts=given, checkpoint=checkpoint, options=options, progress=progress)
    if as_json:
        write_json(as_json, report)
    if plots:
        plot_trade_off(report["settings"], plots)
    show_bench(report)
