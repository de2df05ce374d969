"""`bench`: times on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import GREEDY_GRAPH, open_bundle
from cllm_export.checks import option_specs
from cllm_export.cli.app import command
from cllm_export.cli.before.arguments import (
    check_bundle,
    check_checkpoint_or_adapter,
    check_plan,
    check_prompts,
    check_report,
)
from cllm_export.cli.options import (
    CheckpointOption,
    ForceOption,
    JsonOption,
    LimitOption,
    PromptsOption,
    ReportOption,
    given,
)
from cllm_export.cli.show.console import progress_bar
from cllm_export.cli.show.decoding import show_bench
from cllm_export.cli.show.report import show_report
from cllm_export.cli.signature import with_options
from cllm_export.errors import OptionError, about
from cllm_export.extras import needs_extra
from cllm_export.measure.options import BenchOptions
from cllm_export.prompts import read_prompts


def _parse_methods(names: list[str]) -> tuple[str, ...]:
    """Methods as given. The options class checks them."""
    return tuple(names)


@command("cllm-export bench my-bundle --prompts prompts.jsonl --output speed.json")
@with_options(
    BenchOptions,
    parse={"methods": _parse_methods},
    metavars={"methods": f"<{'|'.join(option_specs(BenchOptions)['methods'].choices)}>", "proposer": "SOURCES"},
)
def bench(
    bundles: Annotated[
        list[Path], typer.Argument(help="One bundle, or several of one model to compare.", show_default=False)
    ],
    options: BenchOptions,
    prompts: PromptsOption = None,
    checkpoint: CheckpointOption = None,
    limit: LimitOption = None,
    output: ReportOption = None,
    plots: Annotated[
        Path | None, given("--plots", "Directory for a plot of tokens per forward against a forward's time.", "Output")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time methods and block sizes of one or several bundles on real prompts; say what is fastest on this machine."""
    from cllm_export.cli.show.plots import TRADE_OFF, check_plots, plot_trade_off
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
    check_plan(bundles[0], options.provider, options.plan)
    check_prompts("prompts", prompts, limit=limit)
    check_checkpoint_or_adapter(checkpoint)
    check_report("output", output, force=force)
    with about("plots"):
        check_plots(plots, TRADE_OFF, force=force)
    if plots and opened[0].manifest.graphs[GREEDY_GRAPH].fixed_shapes:
        raise OptionError(f"plots are of several block sizes, and {opened[0].path} is pinned to one", fields=("plots",))
    chosen = read_prompts(prompts, limit=limit) if prompts else ()
    with progress_bar() as progress, needs_extra("export"):
        report = run_bench(opened, prompts=chosen, checkpoint=checkpoint, options=options, progress=progress)
    show_report(report, show_bench, as_json=as_json, output=output)
    if plots:
        plot_trade_off(report["settings"], plots)
