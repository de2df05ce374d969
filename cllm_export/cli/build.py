"""`build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cllm_export.bundle.contract import Precision
from cllm_export.bundle.linked_weights import WeightsMode
from cllm_export.bundle.manifest import FillName, Loop, TrainedWith
from cllm_export.bundle.quantization import PrecisionName, split_precision
from cllm_export.bundle.storage import write_json
from cllm_export.cli.app import app
from cllm_export.cli.options import BaseOption, QuantizeForOption
from cllm_export.cli.show.console import bytes_text, progress_bar, say
from cllm_export.cli.sizes import parse_size
from cllm_export.errors import OptionError
from cllm_export.extras import needs_extra

Target = Literal["onnx", "tensorrt"]


@app.command()
def build(
    checkpoint: Annotated[
        Path, typer.Argument(help="A Hugging Face directory with safetensors, or a LoRA adapter.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.", show_default=False)],
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="n; by default what the model was trained with, else 16.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Prompt plus new tokens; by default the model's, capped at 2048."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Slots.")] = 1,
    precision: Annotated[
        PrecisionName,
        typer.Option("--precision", help="fp16, bf16 and fp8 are for GPU engines; int8-dynamic and int4 for CPUs."),
    ] = "fp32",
    compute: Annotated[
        Precision | None,
        typer.Option(
            "--compute", help="dtype of what int8, int4 or fp8 leave, and of the KV cache; fp16 for TensorRT."
        ),
    ] = None,
    quantize_head: Annotated[
        bool, typer.Option("--quantize-head", help="Quantise the head too, which by default is kept.")
    ] = False,
    quantize_block: Annotated[
        int | None, typer.Option("--quantize-block", help="int4: input channels that share a scale, 32, 64 or 128.")
    ] = None,
    quantize_for: QuantizeForOption = None,
    scales: Annotated[
        Path | None,
        typer.Option("--scales", help="What cllm-export calibrate wrote: int8 and fp8 need it, int4 then takes GPTQ."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Checkpoint tensor of a linear layer not to quantise; repeatable."),
    ] = None,
    weights: Annotated[
        WeightsMode | None,
        typer.Option(
            "--weights", help="Read them from the checkpoint, or copy them; by default link if none needs work."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Bound of the build's own memory, such as 1GB.")
    ] = None,
    base: BaseOption = None,
    num_layers: Annotated[
        int | None, typer.Option("--num-layers", help="The first layers alone, for debugging.")
    ] = None,
    fixed_shapes: Annotated[
        bool, typer.Option("--fixed-shapes", help="Pin batch, block and extent in the graph, for edge compilers.")
    ] = False,
    lookahead: Annotated[
        bool, typer.Option("--lookahead", help="Add the graph that lookahead decoding needs.")
    ] = False,
    trained_block_size: Annotated[
        int | None, typer.Option("--trained-block-size", help="n the model was tuned with, if its config is silent.")
    ] = None,
    trained_fill: Annotated[FillName | None, typer.Option("--trained-fill", help="Fill, likewise.")] = None,
    trained_loop: Annotated[Loop | None, typer.Option("--trained-loop", help="Loop, likewise.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    target: Annotated[
        Target, typer.Option("--target", help="tensorrt also builds this machine's plan, as `plan` does.")
    ] = "onnx",
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write stages, memory and bytes here.")] = None,
) -> None:
    """Export a checkpoint into a bundle."""
    gpu = None
    if target == "tensorrt":
        from cllm_export.tensorrt.library import open_gpu

        gpu = open_gpu()  # before the export, which takes longer
    with needs_extra("export"):
        from cllm_export.exporter.options import BuildOptions
        from cllm_export.exporter.pipeline import export
        from cllm_export.exporter.quantize.rewrite import quantize_options
    dtype, scheme = split_precision(precision, compute)
    options = BuildOptions(
        block_size=block_size,
        max_length=max_length,
        batch_size=batch_size,
        precision=dtype,
        quantize=quantize_options(
            scheme,
            head=quantize_head,
            block_size=quantize_block,
            keep=tuple(keep or ()),
            scales=scales,
            engine=quantize_for,
        ),
        fixed_shapes=fixed_shapes,
        trained_with=_trained_with(trained_block_size, trained_fill, trained_loop),
        weights=weights,
        max_memory=parse_size(max_memory, flag="--max-memory") if max_memory is not None else None,
        base=base,
        num_layers=num_layers,
        lookahead=lookahead,
    )
    if target == "tensorrt" and options.quantize and "tensorrt" not in options.quantize.engines:
        advice = "add --quantize-for tensorrt" if scheme == "int4" else "choose int8, int4 or fp8"
        raise OptionError(f"--precision {scheme} makes a graph for ONNX Runtime, and --target is tensorrt: {advice}")
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


def _trained_with(block_size: int | None, fill: FillName | None, loop: Loop | None) -> TrainedWith | None:
    if block_size is None:
        if fill or loop:
            raise OptionError("--trained-fill and --trained-loop need --trained-block-size")
        return None
    return TrainedWith(block_size=block_size, fill=fill or "pad", loop=loop or "sliding")
