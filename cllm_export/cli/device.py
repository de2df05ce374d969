"""`plan`, `plan-memory` and `doctor`: what a device runs and needs."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.cli.app import app
from cllm_export.cli.options import BundleArgument, JsonOption
from cllm_export.cli.show.bundle import show_findings, show_memory
from cllm_export.cli.show.console import say
from cllm_export.cli.signature import with_options
from cllm_export.cli.sizes import parse_size
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.memory import MemoryOptions, memory_figures
from cllm_export.tensorrt.plan_options import PlanOptions

PARSE = {"workspace": partial(parse_size, name="workspace")}


@app.command()
@with_options(PlanOptions, parse=PARSE)
def plan(
    bundle: BundleArgument,
    options: PlanOptions,
    force: Annotated[bool, typer.Option("--force", help="Build the plan even if there is one already.")] = False,
) -> None:
    """Build a bundle's TensorRT plan for this machine. Needs a GPU, TensorRT and no torch."""
    typer.echo(f"wrote {build_plan(open_bundle(bundle), options, force=force, say=say).path}")


@app.command()
@with_options(MemoryOptions, parse=PARSE)
def plan_memory(bundle: BundleArgument, options: MemoryOptions, as_json: JsonOption = False) -> None:
    """Say what memory a device needs for a bundle and for building its plan, and how each figure is computed."""
    figures = memory_figures(open_bundle(bundle), options)
    if as_json:
        typer.echo(json.dumps([vars(figure) for figure in figures], indent=2))
    else:
        show_memory(figures)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what of the GPU stack is here, what is missing or mismatched, and what fixes it."""
    from cllm_export.tensorrt.doctor import examine, report

    findings = examine()
    if as_json:
        typer.echo(json.dumps(report(findings), indent=2))
    else:
        show_findings(findings, report(findings))
