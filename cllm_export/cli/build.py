"""`build` and `import`."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.quantization import PrecisionName, builds_for, split_precision
from cllm_export.checks import parse_share
from cllm_export.cli.app import command
from cllm_export.cli.before.commands import check_build, check_import
from cllm_export.cli.flags import names_replaced
from cllm_export.cli.options import BundleOutputOption, ForceOption, given, parse_size
from cllm_export.cli.show.console import bytes_text, progress_bar, say
from cllm_export.cli.signature import with_options
from cllm_export.errors import OptionError
from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.options import ImportOptions
from cllm_export.exporter.options import BuildOptions, TrainedOptions
from cllm_export.exporter.quantize.options import LayerOptions, QuantizeOptions, quantize_options
from cllm_export.extras import needs_extra
from cllm_export.progress import Voice
from cllm_export.tensorrt.library import LIBRARIES
from cllm_export.tensorrt.plan_options import PlanOptions

Target = Literal["onnx", "tensorrt", "tensorrt-rtx"]
TargetsOption = Annotated[
    list[str] | None,
    given("--for", "Generation of cards that a plan of tensorrt-rtx is for; repeat it for several.", "Output"),
]


@command("cllm-export build path/to/checkpoint --output my-bundle")
@with_options(BuildOptions, parse={"max_memory": partial(parse_size, name="max_memory")})
@with_options(
    LayerOptions,
    names={"head": "quantize_head", "engine": "quantize_for"},
    parse={"min_agreement": partial(parse_share, name="min_agreement")},
    flags={"scheme": "--precision"},
)
@with_options(
    TrainedOptions, names={"block_size": "trained_block_size", "proposer": "trained_proposer", "loop": "trained_loop"}
)
def build(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face directory with safetensors, a LoRA adapter, or a GGUF file.", show_default=False
        ),
    ],
    output: BundleOutputOption,
    options: BuildOptions,
    layers: LayerOptions,
    trained: TrainedOptions | None,
    precision: Annotated[
        PrecisionName,
        given(
            "--precision",
            "Number format of the bundle; fp16, bf16 and fp8 are for GPU engines, int8-dynamic and int4 for CPUs.",
            "Quantisation",
        ),
    ] = "fp32",
    compute: Annotated[
        Precision | None,
        given(
            "--compute",
            "With int8, int4 or fp8: dtype of the KV cache and of unquantised layers; for TensorRT choose fp16.",
            "Quantisation",
        ),
    ] = None,
    target: Annotated[
        Target,
        given("--target", "With tensorrt or tensorrt-rtx, also build that library's plan, as `plan` does.", "Output"),
    ] = "onnx",
    targets: TargetsOption = None,
    force: ForceOption = False,
    as_json: Annotated[
        bool, given("--json", "Print a report of stages, memory and bytes on standard output as JSON.", "Output")
    ] = False,
) -> None:
    """Export a checkpoint into a bundle."""
    dtype, scheme = split_precision(precision, compute)
    quantize = quantize_options(scheme, layers)
    with names_replaced({"precision": "compute"} if scheme else {}):
        options = replace(
            options, precision=dtype, quantize=quantize, trained_with=trained.trained_with if trained else None
        )
    check_build(checkpoint, output, options, force=force)
    plan = _checked_plan(output, target, targets or [], dtype, quantize)
    with needs_extra("export"):
        from cllm_export.exporter.pipeline import export
    with progress_bar() as progress:
        done = export(checkpoint, output, options, force=force, progress=progress, say=say)
    size = bytes_text(done.report.bytes_written)
    linked = f", {bytes_text(done.report.bytes_linked)} linked" if done.report.bytes_linked else ""
    tell = say if as_json else typer.echo
    tell(f"wrote {output} ({size}{linked}, fingerprint {done.bundle.fingerprint[:12]})")
    if as_json:
        typer.echo(json.dumps(vars(done.report), indent=2))
    if plan:
        from cllm_export.tensorrt.build_plan import build_plan

        tell(f"wrote {build_plan(done.bundle, plan, say=say).path}")


@command("cllm-export import model.Q4_K_M.gguf --output my-checkpoint", name="import")
@with_options(ImportOptions)
def import_file(
    file: Annotated[Path, typer.Argument(help="A GGUF file, as llama.cpp reads it.", show_default=False)],
    output: Annotated[Path, given("--output", "The checkpoint to write.", "Output", "-o")],
    options: ImportOptions,
    force: ForceOption = False,
) -> None:
    """Import a GGUF file as a checkpoint, with its tokenizer and its chat template."""
    check_import(file, output, force=force)
    with progress_bar() as progress:
        done = import_gguf(file, output, options, force=force, voice=Voice(progress=progress, say=say))
    say(f"peak memory {done.peak / 1e6:,.0f} MB")
    typer.echo(f"wrote {output} ({bytes_text(done.num_bytes)}, {done.family}, {options.dtype})")


def _checked_plan(
    output: Path, target: Target, targets: list[str], precision: Precision, quantize: QuantizeOptions | None
) -> PlanOptions | None:
    """The options of the plan to build after the export; None if there is none to build. Its builder is here."""
    if target == "onnx":
        if targets:
            raise OptionError(
                "targets names the cards of a plan: give target='tensorrt-rtx' too", fields=("targets", "target")
            )
        return None
    _require_tensorrt(quantize)
    from cllm_export.tensorrt.build_plan import open_builder
    from cllm_export.tensorrt.engine import platform_of

    plan = PlanOptions(engine=target, targets=tuple(targets))
    library, formats = LIBRARIES[target], (precision, *([quantize.scheme] if quantize else []))
    library.require_formats(f"{output} would be", formats, plan.targets)
    _, gpu = open_builder(plan)
    if gpu is not None:
        library.require_formats(f"{output} would be", formats, (platform_of(gpu).generation,))
    return plan


def _require_tensorrt(quantize: QuantizeOptions | None) -> None:
    """Refuse a scheme whose graph TensorRT cannot run."""
    if quantize and "tensorrt" not in quantize.form.engines:
        advice = "add engine='tensorrt'" if quantize.spec.form("tensorrt") else f"choose {builds_for('tensorrt')}"
        raise OptionError(
            f"precision='{quantize.scheme}' makes a graph for ONNX Runtime, and TensorRT is to run it: {advice}",
            fields=("target",),
        )
