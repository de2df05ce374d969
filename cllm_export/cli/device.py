"""`plan`, `plan-memory` and `doctor`: what a device runs and needs."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from cllm_export.bundle.manifest import open_bundle
from cllm_export.cli.app import EXIT_FAILED, command
from cllm_export.cli.options import BundleArgument, JsonOption, given, parse_size
from cllm_export.cli.show.bundle import show_findings, show_memory
from cllm_export.cli.show.console import say
from cllm_export.cli.signature import with_options
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.memory import MemoryOptions, judge_memory, memory_figures, plan_figures
from cllm_export.tensorrt.plan_files import plans_in
from cllm_export.tensorrt.plan_options import PlanOptions

PARSE = {"workspace": partial(parse_size, name="workspace")}


@command("cllm-export plan my-bundle --batch-size 4 --workspace 2GB")
@with_options(PlanOptions, parse=PARSE)
def plan(
    bundle: BundleArgument,
    options: PlanOptions,
    force: Annotated[bool, given("--force", "Build the plan even if there is one already.", "Output")] = False,
) -> None:
    """Build a bundle's TensorRT plan, for the GPU of this machine or for named generations of cards."""
    typer.echo(f"wrote {build_plan(open_bundle(bundle), options, force=force, say=say).path}")


@command("cllm-export plan-memory my-bundle --precision fp16 --batch-size 4")
@with_options(MemoryOptions, parse=PARSE | {"device_memory": partial(parse_size, name="device_memory")})
def plan_memory(bundle: BundleArgument, options: MemoryOptions, as_json: JsonOption = False) -> None:
    """Say what memory a device needs for a bundle and for building its plan, and exit with 1 if it does not fit."""
    opened = open_bundle(bundle)
    figures, verdict = memory_figures(opened, options), judge_memory(opened, options)
    figures += [figure for plan in plans_in(opened) for figure in plan_figures(plan)]
    if as_json:
        typer.echo(json.dumps({"figures": [vars(each) for each in figures], "verdict": vars(verdict)}, indent=2))
    else:
        show_memory(figures, verdict)
    if not verdict.fits:
        raise typer.Exit(EXIT_FAILED)


@command("cllm-export doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Say what of the GPU stack is here, what is missing or mismatched, and what fixes it."""
    from cllm_export.tensorrt.doctor import examine, report

    findings = examine()
    if as_json:
        typer.echo(json.dumps(report(findings), indent=2))
    else:
        show_findings(findings, report(findings))
