"""`build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.linked_weights import WeightsMode
from cllm_export.bundle.manifest import FillName, Loop, TrainedWith
from cllm_export.bundle.quantization import PrecisionName, builds_for, split_precision
from cllm_export.bundle.storage import write_json
from cllm_export.cli.app import app
from cllm_export.cli.flags import names_replaced
from cllm_export.cli.options import BaseOption, QuantizeForOption
from cllm_export.cli.show.console import bytes_text, progress_bar, say
from cllm_export.cli.sizes import parse_size
from cllm_export.errors import OptionError
from cllm_export.extras import needs_extra

if TYPE_CHECKING:
    from cllm_export.exporter.quantize.options import QuantizeOptions

Target = Literal["onnx", "tensorrt"]


@app.command()
def build(
    checkpoint: Annotated[
        Path, typer.Argument(help="A Hugging Face directory with safetensors, or a LoRA adapter.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The directory to write the bundle to.", show_default=False)
    ],
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size", help="Block size n, in tokens; by default what the model was trained with, else 16."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Largest number of tokens of a prompt and its new tokens; by default the model's, at most 2048.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Number of slots: prompts that are decoded at once.")
    ] = 1,
    precision: Annotated[
        PrecisionName,
        typer.Option(
            "--precision",
            help="Number format of the bundle; fp16, bf16 and fp8 are for GPU engines, int8-dynamic and int4 for CPUs.",
        ),
    ] = "fp32",
    compute: Annotated[
        Precision | None,
        typer.Option(
            "--compute",
            help="With int8, int4 or fp8: dtype of the KV cache and of unquantised layers; for TensorRT choose fp16.",
        ),
    ] = None,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="Quantise the head (lm_head) too.")] = False,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="For int4: how many input channels share a scale: 32, 64 or 128."),
    ] = None,
    quantize_for: QuantizeForOption = None,
    scales: Annotated[
        Path | None,
        typer.Option(
            "--scales", help="The scales file that `calibrate` wrote. int8 and fp8 need it; int4 uses GPTQ with it."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", help="Do not quantise the linear layer of this checkpoint tensor; repeat the option for several."
        ),
    ] = None,
    weights: Annotated[
        WeightsMode,
        typer.Option(
            "--weights", help="Copy the weights into the bundle, or link to the checkpoint, which must then stay there."
        ),
    ] = "copy",
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Largest amount of memory that the build may use, such as 1GB.")
    ] = None,
    base: BaseOption = None,
    num_layers: Annotated[
        int | None, typer.Option("--num-layers", help="Export only this many layers, from the first, for debugging.")
    ] = None,
    fixed_shapes: Annotated[
        bool,
        typer.Option(
            "--fixed-shapes",
            help="Fix the batch size, block size and KV extent in the graph, for compilers that need fixed shapes.",
        ),
    ] = False,
    lookahead: Annotated[
        bool, typer.Option("--lookahead", help="Add the graph that lookahead decoding needs.")
    ] = False,
    trained_block_size: Annotated[
        int | None,
        typer.Option(
            "--trained-block-size", help="Block size that the model was tuned with, if its config does not say."
        ),
    ] = None,
    trained_fill: Annotated[
        FillName | None,
        typer.Option("--trained-fill", help="Fill that the model was tuned with, if its config does not say."),
    ] = None,
    trained_loop: Annotated[
        Loop | None,
        typer.Option("--trained-loop", help="Loop that the model was tuned with, if its config does not say."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    target: Annotated[
        Target,
        typer.Option("--target", help="With tensorrt, also build the TensorRT plan for this machine, as `plan` does."),
    ] = "onnx",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write a report of stages, memory and bytes to this file as JSON.")
    ] = None,
) -> None:
    """Export a checkpoint into a bundle."""
    gpu = None
    if target == "tensorrt":
        from cllm_export.tensorrt.library import open_gpu

        gpu = open_gpu()  # before the export, which takes longer
    with needs_extra("export"):
        from cllm_export.exporter.options import BuildOptions
        from cllm_export.exporter.pipeline import export
        from cllm_export.exporter.quantize.options import quantize_options
    dtype, scheme = split_precision(precision, compute)
    with names_replaced({"scheme": "precision", "head": "quantize_head", "engine": "quantize_for"}):
        quantize = quantize_options(
            scheme,
            head=quantize_head,
            group_size=group_size,
            keep=tuple(keep or ()),
            scales=scales,
            engine=quantize_for,
        )
        options = BuildOptions(
            block_size=block_size,
            max_length=max_length,
            batch_size=batch_size,
            precision=dtype,
            quantize=quantize,
            fixed_shapes=fixed_shapes,
            trained_with=_trained_with(trained_block_size, trained_fill, trained_loop),
            weights=weights,
            max_memory=parse_size(max_memory, flag="--max-memory") if max_memory is not None else None,
            base=base,
            num_layers=num_layers,
            lookahead=lookahead,
        )
    if target == "tensorrt" and quantize:
        _require_tensorrt(quantize)
    with progress_bar() as progress:
        done = export(checkpoint, output, options, force=force, progress=progress, say=say)
    size = bytes_text(done.report.bytes_written)
    linked = f", {bytes_text(done.report.bytes_linked)} linked" if done.report.bytes_linked else ""
    typer.echo(f"wrote {output} ({size}{linked}, fingerprint {done.bundle.fingerprint[:12]})")
    if as_json is not None:
        write_json(as_json, vars(done.report))
    if gpu is not None:
        from cllm_export.tensorrt.build_plan import build_plan

        typer.echo(f"wrote {build_plan(done.bundle, gpu=gpu, say=say).path}")


def _require_tensorrt(quantize: QuantizeOptions) -> None:
    """Refuse a quantised graph of which TensorRT makes no plan."""
    if "tensorrt" not in quantize.form.engines:
        other = quantize.spec.form("tensorrt")
        advice = "add --quantize-for tensorrt" if other else f"choose {builds_for('tensorrt')}"
        raise OptionError(
            f"--precision {quantize.scheme} makes a graph for ONNX Runtime, and --target is tensorrt: {advice}"
        )


def _trained_with(block_size: int | None, fill: FillName | None, loop: Loop | None) -> TrainedWith | None:
    if block_size is None:
        if fill or loop:
            raise OptionError("--trained-fill and --trained-loop need --trained-block-size")
        return None
    return TrainedWith(block_size=block_size, fill=fill or "pad", loop=loop or "sliding")
