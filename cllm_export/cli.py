"""The command line: parse, call, print. No logic stands here."""

from __future__ import annotations

import json
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cllm_export import __version__, display
from cllm_export.bundle import GREEDY_GRAPH, FillName, Loop, TrainedWith, open_bundle
from cllm_export.contract import Precision
from cllm_export.errors import CllmExportError, OptionError, OutputError, PromptError
from cllm_export.evaluation.task import TaskName
from cllm_export.extras import needs_extra
from cllm_export.linked import WeightsMode
from cllm_export.plans import Hardware
from cllm_export.prompts import Prompt, parse_prompts, read_prompts
from cllm_export.quantization import SCHEMES, PrecisionName, split_precision
from cllm_export.quantization import Engine as QuantizedFor
from cllm_export.runtime.draft import SOURCES, parse_fill
from cllm_export.runtime.generate import METHODS, Generation, Method, Model, load
from cllm_export.runtime.prefix_snapshot import check_target
from cllm_export.runtime.providers import Provider
from cllm_export.runtime.request import JacobiMethod
from cllm_export.sizes import parse_size
from cllm_export.training import MixedPrecision, Objective, OptimizerName

if TYPE_CHECKING:
    from cllm_export.training.lora import LoraOptions

EXIT_FAILED, EXIT_ERROR, EXIT_DEFECT = 1, 2, 3
Target = Literal["onnx", "tensorrt"]

app = typer.Typer(
    name="cllm-export",
    help="Export Consistency LLMs and decode them in parallel, token for token equal to autoregressive decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _check_fill(fill: str | None) -> str | None:
    try:
        if fill is not None:
            parse_fill(fill)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from None
    return fill


BundleArgument = Annotated[Path, typer.Argument(help="A directory that `cllm-export build` wrote.", show_default=False)]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", help="JSON Lines (`prompt` or `messages`, optional `id`, `answer`), or a prompt a line."),
]
CheckpointOption = Annotated[Path | None, typer.Option("--checkpoint", help="The Hugging Face directory it came from.")]
BaseOption = Annotated[Path | None, typer.Option("--base", help="Checkpoint of an adapter, if not the one it names.")]
QuantizeForOption = Annotated[
    QuantizedFor | None, typer.Option("--quantize-for", help="int4: the engine of the graph; by default onnxruntime.")
]
BlockSizeOption = Annotated[int | None, typer.Option("--block-size", help="n; by default the bundle's own.")]
ChosenBlockSizeOption = Annotated[
    str | None, typer.Option("--block-size", help="n, or auto: chosen forward by forward, the default of jacobi.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads in the engine; by default all.")]
SourcesOption = Annotated[
    str | None,
    typer.Option(
        "--fill",
        metavar="SOURCES",
        help=f"Draft sources, asked in order: {', '.join(SOURCES)}, joined by +.",
        callback=_check_fill,
    ),
]
DraftModelOption = Annotated[
    Path | None, typer.Option("--draft-model", help="Another bundle with the same tokenizer, for --fill model.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first so many prompts.")]
WindowOption = Annotated[int | None, typer.Option("--window", help="W of lookahead: columns of its window.")]
NGramOption = Annotated[int | None, typer.Option("--ngram", help="N of lookahead: tokens of an n-gram.")]
GuessesOption = Annotated[int | None, typer.Option("--guesses", help="G of lookahead: n-grams tried in a forward.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="New tokens a prompt, at most.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks; anywhere on the command line.")] = False,
) -> None:
    """Export Consistency LLMs and decode them in parallel."""


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
        from cllm_export.tensorrt_library import open_gpu

        gpu = open_gpu()  # before the export, which takes longer
    with needs_extra("export"):
        from cllm_export.exporter.pipeline import BuildOptions, export
        from cllm_export.exporter.quantize import quantize_options
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
    with display.progress_bar() as progress:
        done = export(checkpoint, output, options, force=force, progress=progress, say=display.say)
    size = display.bytes_text(done.report.bytes_written)
    linked = f", {display.bytes_text(done.report.bytes_linked)} linked" if done.report.bytes_linked else ""
    typer.echo(f"wrote {output} ({size}{linked}, fingerprint {done.bundle.fingerprint[:12]})")
    if as_json is not None:
        _write_text(as_json, json.dumps(vars(done.report), indent=2) + "\n")
    if gpu is not None:
        from cllm_export.exporter.plan import build_plan

        typer.echo(f"wrote {build_plan(done.bundle, gpu=gpu, say=display.say).path}")


@app.command()
def plan(
    bundle: BundleArgument,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Slots; by default the bundle's.")] = None,
    block_sizes: Annotated[
        list[int] | None, typer.Option("--block-size", help="n; repeatable. By default 1 and the bundle's own.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", help="Tokens of the prompt a forward; by default 128.")
    ] = None,
    extents: Annotated[
        list[int] | None,
        typer.Option("--extent", help="KV rows that attention reads; repeatable. By default 256 and its doubles."),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Scratch that the builder may use, such as 512MB; by default all.")
    ] = None,
    optimization_level: Annotated[
        int, typer.Option("--optimization-level", help="0 to 5: how long to look for faster kernels.")
    ] = 3,
    hardware: Annotated[
        Hardware, typer.Option("--hardware", help="GPUs it runs on; the wider, the fewer kernels fit.")
    ] = "same",
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Without them no sampling, grammar or logprobs.")
    ] = True,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory; slower.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="A small plan, which takes its weights from the bundle at load.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later versions of TensorRT; larger, maybe slower.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build it even if it is there.")] = False,
) -> None:
    """Build a bundle's TensorRT plan for this machine. Needs a GPU, TensorRT and no torch."""
    from cllm_export.exporter.plan import PlanOptions, build_plan

    options = PlanOptions(
        batch_size=batch_size,
        block_sizes=tuple(block_sizes or ()),
        prefill_chunk=prefill_chunk,
        extents=tuple(extents or ()),
        workspace=parse_size(workspace, flag="--workspace") if workspace is not None else None,
        optimization_level=optimization_level,
        hardware=hardware,
        logits=logits,
        weight_streaming=weight_streaming,
        strip_weights=strip_weights,
        version_compatible=version_compatible,
    )
    typer.echo(f"wrote {build_plan(open_bundle(bundle), options, force=force, say=display.say).path}")


@app.command()
def verify(
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    base: BaseOption = None,
    prompts: PromptsOption = None,
    block_sizes: Annotated[
        list[int] | None, typer.Option("--block-size", help="n; give it several times for several.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--whole",
            help="Compare with the checkpoint layer by layer, or decode; by default whichever fits in memory.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Prove a bundle lossless, write parity.json into it, and exit with 1 if it is not."""
    from cllm_export.verify import VerifyOptions
    from cllm_export.verify import verify as run

    if limit is not None and prompts is None:
        raise OptionError("--limit needs --prompts")
    options = VerifyOptions(
        max_new_tokens=max_new_tokens, block_sizes=tuple(block_sizes or ()), threads=threads, by_layer=by_layer
    )
    with display.progress_bar() as progress, needs_extra("export"):
        parity = run(
            open_bundle(bundle),
            prompts=read_prompts(prompts, limit=limit) if prompts else (),
            checkpoint=checkpoint,
            base=base,
            options=options,
            progress=progress,
        )
    display.show_parity(parity)
    if not parity.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it and --prompts, standard input.", show_default=False)
    ] = None,
    prompts: PromptsOption = None,
    method: Annotated[
        Method | None, typer.Option("--method", help="By default the loop the model was trained with.")
    ] = None,
    block_size: ChosenBlockSizeOption = None,
    window: WindowOption = None,
    ngram: NGramOption = None,
    guesses: GuessesOption = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="n is the bundle's own, never chosen.")
    ] = False,
    fill: SourcesOption = None,
    draft_model: DraftModelOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of sampling and the prompt fill; fresh for each sampled prompt.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Above 0 samples.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample among this many tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample among tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Least share of the best's probability.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 disfavours tokens that stood before.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option("--logit-bias", help="TOKEN=BIAS, -inf to ban; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: log-probabilities, and this many alternatives.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="File of a schema that the text must match.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="What the whole text must match.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="File of a Lark grammar that the text must match.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; repeatable.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="By default whatever fits.")
    ] = None,
    load_prefix: Annotated[
        Path | None, typer.Option("--load-prefix", help="Start from a prompt's state that --save-prefix wrote.")
    ] = None,
    save_prefix: Annotated[
        Path | None, typer.Option("--save-prefix", help="Keep the prompt's state in this file, for --load-prefix.")
    ] = None,
    limit: LimitOption = None,
    num_slots: Annotated[
        int | None,
        typer.Option("--num-slots", help="Prompts decoded at once; by default the bundle's batch size.", min=1),
    ] = None,
    threads: ThreadsOption = None,
    provider: Annotated[
        Provider, typer.Option("--provider", help="cpu, cuda (both ONNX Runtime), or tensorrt (the bundle's plan).")
    ] = "cpu",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="cuda: have ONNX Runtime record forwards and replay them.")
    ] = False,
    forwards_per_sync: Annotated[
        int | None,
        typer.Option(
            "--forwards-per-sync", min=1, help="tensorrt: decode on the device, asked once in so many forwards."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each prompt.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Statistics on standard error.")] = False,
    blocks: Annotated[bool, typer.Option("--show-blocks", help="Every block, coloured by what became of it.")] = False,
) -> None:
    """Decode prompts: from the command line, a file, or standard input."""
    if as_json and (blocks or stats):
        raise OptionError("--json excludes --show-blocks and --stats: its lines have the statistics")
    if logprobs is not None and not as_json:
        raise OptionError("--logprobs needs --json: they stand in its lines")
    _require_use(draft_model, method, fill)
    given = _gather_prompts(prompt, prompts, limit)
    if save_prefix is not None:
        if len(given) != 1:
            raise OptionError(f"--save-prefix keeps the state of one prompt, got {len(given)} prompts")
        check_target(save_prefix)
    slots = num_slots or (_slots_for(bundle, len(given)) if provider != "tensorrt" else None)
    options: dict[str, Any] = {
        "method": method,
        "block_size": _parse_block_size(block_size),
        "window": window,
        "ngram": ngram,
        "guesses": guesses,
        "deterministic": deterministic,
        "fill": fill,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "logit_bias": _parse_bias(logit_bias or ()),
        "logprobs": logprobs,
        "json_schema": _read_grammar(json_schema, "--json-schema"),
        "regex": regex,
        "grammar": _read_grammar(grammar, "--grammar"),
        "stop": tuple(stop or ()),
        "max_new_tokens": max_new_tokens,
        "forwards_per_sync": forwards_per_sync,
    }
    with load(
        bundle,
        threads=threads,
        num_slots=slots,
        draft_model=draft_model,
        provider=provider,
        cuda_graphs=cuda_graphs,
    ) as model:
        if load_prefix is not None:
            model.load_prefix(load_prefix)
        if len(given) > 1 and model.engine.num_slots > 1 and forwards_per_sync is None:
            _print_together(model, given, options, as_json=as_json, stats=stats, blocks=blocks)
            return
        for entry in given:
            with _naming(entry, len(given)):
                if as_json:
                    _print_json_line(entry, model.generate(entry.content, **options))
                else:
                    _print_text(model, entry, options, stats=stats, blocks=blocks)
                if save_prefix is not None:
                    model.save_prefix(save_prefix, entry.content)


@app.command()
def inspect(bundle: BundleArgument, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what is in a bundle and what memory it needs."""
    from cllm_export.inspect import describe

    description = describe(open_bundle(bundle))
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        display.show_description(description)


@app.command()
def plan_memory(
    bundle: BundleArgument,
    precision: Annotated[Precision | None, typer.Option("--precision", help="By default the bundle's own.")] = None,
    block_size: BlockSizeOption = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="By default the bundle's own.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Slots; by default the bundle's.")] = None,
    prefill_chunk: Annotated[int, typer.Option("--prefill-chunk", help="Tokens of the prompt a forward.")] = 128,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Scratch that the builder may use, such as 512MB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what memory a device needs for a bundle and for building its plan, and how each figure is computed."""
    from cllm_export.device_memory import MemoryOptions, memory_figures

    options = MemoryOptions(
        precision=precision,
        block_size=block_size,
        max_length=max_length,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        workspace=parse_size(workspace, flag="--workspace") if workspace is not None else None,
    )
    figures = memory_figures(open_bundle(bundle), options)
    if as_json:
        typer.echo(json.dumps([vars(figure) for figure in figures], indent=2))
    else:
        display.show_memory(figures)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what of the GPU stack is here, what is missing or mismatched, and what fixes it."""
    from cllm_export.doctor import examine, report

    findings = examine()
    if as_json:
        typer.echo(json.dumps(report(findings), indent=2))
    else:
        display.show_findings(findings, report(findings))


@app.command()
def trace(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt file, as of `generate`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.", show_default=False)],
    method: Annotated[Method | None, typer.Option("--method", help="Only this loop; by default all.")] = None,
    block_size: BlockSizeOption = None,
    fill: Annotated[FillName, typer.Option("--fill", help="pad or repeat.")] = "pad",
    max_new_tokens: MaxNewTokensOption = 32,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Record every forward of a few requests, for those who write the loop in another language: see docs/loop.md."""
    from cllm_export.traces import DEFAULT_METHODS, record_traces

    given = read_prompts(prompts, limit=limit)
    with load(bundle, threads=threads) as model:
        traces = record_traces(
            open_bundle(bundle),
            model,
            given,
            methods=(method,) if method else DEFAULT_METHODS,
            block_size=block_size,
            fill=fill,
            max_new_tokens=max_new_tokens,
        )
    _write_text(output, json.dumps(traces) + "\n")
    typer.echo(f"wrote {output} ({len(traces['traces'])} traces)")


@app.command()
def bench(
    bundle: BundleArgument,
    prompts: PromptsOption = None,
    checkpoint: CheckpointOption = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="Only this one, beside autoregressive; by default every loop but lookahead."),
    ] = None,
    block_size: BlockSizeOption = None,
    fill: SourcesOption = None,
    draft_model: DraftModelOption = None,
    window: WindowOption = None,
    ngram: NGramOption = None,
    guesses: GuessesOption = None,
    sweep: Annotated[str, typer.Option("--sweep", help="Further block sizes for the sliding loop: 4,8,12.")] = "",
    max_new_tokens: MaxNewTokensOption = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes; medians are reported.")] = 3,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
) -> None:
    """Time every loop on real prompts, interleaved, and the forward at every block size."""
    from cllm_export.bench import BenchOptions, run_bench

    if limit is not None and prompts is None:
        raise OptionError("--limit needs --prompts")
    _require_use(draft_model, method or "speculative", fill)
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
    if as_json and (as_json.is_dir() or not as_json.absolute().parent.is_dir()):
        raise OutputError(f"cannot write the report to {as_json}: give a file in a directory that exists")
    given = read_prompts(prompts, limit=limit) if prompts else ()
    with display.progress_bar() as progress, needs_extra("export"):
        report = run_bench(opened, prompts=given, checkpoint=checkpoint, options=options, progress=progress)
    if as_json:
        _write_text(as_json, json.dumps(report, indent=2) + "\n")
    display.show_bench(report)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face directory.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="The task's data file, or a prompt file.", show_default=False)],
    task: Annotated[TaskName | None, typer.Option("--task", help="What the data is, and how it is scored.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Tell instead what speed-up to expect here, and what it would take.")
    ] = False,
    parent: Annotated[
        Path | None, typer.Option("--parent", help="A bundle or checkpoint to set beside it, decoded alike.")
    ] = None,
    method: Annotated[
        JacobiMethod | None, typer.Option("--method", help="By default the loop the model was trained with.")
    ] = None,
    block_size: BlockSizeOption = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="New tokens a prompt, at most; by default the task's.")
    ] = None,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report here as JSON.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model writes, sandboxed: humaneval only.")
    ] = False,
) -> None:
    """Score a model on a task, with its decoding measures, or probe what decoding in parallel would bring."""
    from cllm_export.evaluation.command import EvaluateOptions, run_evaluation, run_probe

    options = EvaluateOptions(
        method=method,
        block_size=block_size,
        fill=fill,
        max_new_tokens=max_new_tokens,
        limit=limit,
        threads=threads,
        allow_code_execution=allow_code_execution,
    )
    with display.progress_bar() as progress:
        if probe:
            report = run_probe(source, data, task, parent, options, output=output, progress=progress)
        else:
            report = run_evaluation(source, data, task, parent, options, output=output, progress=progress)
    (display.show_probe if probe else display.show_evaluation)(report)


@app.command()
def calibrate(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt file, as of `generate`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The scales file to write.", show_default=False)],
    mix: Annotated[
        float, typer.Option("--mix", help="Share of the rows that come from block states; the rest is clean text.")
    ] = 0.5,
    num_rows: Annotated[int, typer.Option("--rows", help="Rows to observe, at most.")] = 16384,
    gram: Annotated[bool, typer.Option("--gram", help="Gram matrices too, for GPTQ: a large file.")] = False,
    block_size: BlockSizeOption = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the rows that are drawn, and of fills.")] = 0,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing scales file.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
) -> None:
    """See what the linear layers see while a bundle decodes, for `build --scales`. Run it again to go on."""
    from cllm_export.calibration.calibrate import CalibrateOptions
    from cllm_export.calibration.calibrate import calibrate as run
    from cllm_export.calibration.display import show_calibration

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
    with display.progress_bar() as progress:
        report = run(open_bundle(bundle), prompts, output, options, force=force, progress=progress).to_dict()
    if as_json:
        _write_text(as_json, json.dumps(report, indent=2) + "\n")
    show_calibration(report)


@app.command()
def convergence(
    bundles: Annotated[list[Path], typer.Argument(help="Quantised bundles.", show_default=False)],
    against: Annotated[Path, typer.Option("--against", help="The unquantised bundle.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Held-out prompts; with answers, if any.", show_default=False)
    ],
    block_size: BlockSizeOption = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill.")] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
) -> None:
    """Say what quantised bundles lose: tokens per forward, flips by stage of convergence, texts, scores, perplexity."""
    from cllm_export.calibration.convergence import measure_convergence
    from cllm_export.calibration.display import show_convergence
    from cllm_export.calibration.measured import HeldOutOptions
    from cllm_export.evaluation.questions import read_questions
    from cllm_export.evaluation.report_file import check_report_path, write_report

    if as_json:
        check_report_path(as_json)
    options = HeldOutOptions(block_size=block_size, fill=fill, max_new_tokens=max_new_tokens, threads=threads)
    opened, candidates = open_bundle(against), [open_bundle(path) for path in bundles]
    questions = read_questions(prompts, limit=limit)
    with display.progress_bar() as progress:
        report = measure_convergence(opened, candidates, questions, options, progress=progress)
    if as_json:
        write_report(as_json, report)
    show_convergence(report)


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    against: Annotated[Path, typer.Option("--against", help="Its unquantised fp32 bundle.", show_default=False)],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Held-out prompts, on which forwards are counted.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.", show_default=False)],
    precision: Annotated[
        list[str],
        typer.Option(
            "--precision",
            metavar="|".join(SCHEMES),
            help="How linear layers are quantised; several: the fastest here is chosen.",
        ),
    ],
    max_tpf_loss: Annotated[
        str, typer.Option("--max-tpf-loss", help="Share of the tokens per forward that may be lost.")
    ] = "3%",
    max_quality_loss: Annotated[
        str | None,
        typer.Option(
            "--max-quality-loss",
            help="Share of the score that may be lost: execution match, exact match, or equal texts without answers.",
        ),
    ] = None,
    quantize_block: Annotated[
        int | None, typer.Option("--quantize-block", help="int4: input channels that share a scale, 32, 64 or 128.")
    ] = None,
    quantize_for: QuantizeForOption = None,
    scales: Annotated[Path | None, typer.Option("--scales", help="What `calibrate` wrote.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure every layer even if the budget holds without.")
    ] = False,
    block_size: BlockSizeOption = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill.")] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Directory for a plot of the sensitivity.")] = None,
) -> None:
    """Quantise as many layers as a budget allows, choose the fastest of several precisions, and say why."""
    from cllm_export.calibration.display import show_choice
    from cllm_export.calibration.fit import Budget, parse_share
    from cllm_export.calibration.measured import HeldOutOptions
    from cllm_export.calibration.plots import check_plots, plot_choice
    from cllm_export.calibration.quantize import FitOptions, parse_schemes
    from cllm_export.calibration.quantize import quantize as run
    from cllm_export.evaluation.questions import read_questions
    from cllm_export.evaluation.report_file import check_report_path, write_report

    if as_json:
        check_report_path(as_json)
    check_plots(plots)
    options = FitOptions(
        schemes=parse_schemes(precision),
        budget=Budget(
            tpf=parse_share("--max-tpf-loss", max_tpf_loss),
            quality=None if max_quality_loss is None else parse_share("--max-quality-loss", max_quality_loss),
        ),
        block_size=quantize_block,
        engine=quantize_for,
        scales=scales,
        always_rank=sensitivity or plots is not None,
        held_out=HeldOutOptions(block_size=block_size, fill=fill, max_new_tokens=max_new_tokens, threads=threads),
    )
    questions = read_questions(prompts, limit=limit)
    with display.progress_bar() as progress:
        chosen = run(checkpoint, open_bundle(against), questions, output, options, force=force, progress=progress)
    report = chosen.to_dict()
    if as_json:
        write_report(as_json, report)
    if plots:
        plot_choice(report, plots)
    show_choice(str(output), report)


@app.command()
def compare(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles of one model.", show_default=False)],
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt file, as of `generate`.", show_default=False)],
    block_sizes: Annotated[
        list[int] | None, typer.Option("--block-size", help="n; give it several times for several.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Passes; medians are reported.")] = 5,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Directory for a plot of TPF against time.")] = None,
) -> None:
    """Say which of several bundles decodes fastest on this machine, and at which block size."""
    from cllm_export.calibration.plots import check_plots, plot_trade_off
    from cllm_export.compare import CompareOptions
    from cllm_export.compare import compare as run
    from cllm_export.evaluation.report_file import check_report_path, write_report

    if as_json:
        check_report_path(as_json)
    check_plots(plots)
    options = CompareOptions(
        sizes=tuple(block_sizes or ()), max_new_tokens=max_new_tokens, rounds=rounds, threads=threads
    )
    opened, given = [open_bundle(path) for path in bundles], read_prompts(prompts, limit=limit)
    with display.progress_bar() as progress:
        report = run(opened, given, options, progress=progress)
    if as_json:
        write_report(as_json, report)
    if plots:
        plot_trade_off(report["settings"], plots)
    display.show_comparison(report)


@app.command()
def collect(
    source: Annotated[Path, typer.Argument(help="A bundle, or a Hugging Face directory.", show_default=False)],
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt file, as of `generate`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The collection to write, or to go on with.")],
    method: Annotated[
        JacobiMethod | None, typer.Option("--method", help="By default the loop the model was trained with.")
    ] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", help="n; by default the model's own.")] = None,
    fill: Annotated[FillName | None, typer.Option("--fill", help="First guess and refill; likewise.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompt fill; each prompt's own comes of it.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="New tokens a prompt; by default whatever fits.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Prompts at once; by default 8.")] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Prompts a shard, which is saved whole.")] = 1000,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    device: Annotated[str | None, typer.Option("--device", help="Of a checkpoint: cpu, cuda, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
) -> None:
    """Decode prompts and keep every Jacobi state, for `tune`. Run it again to go on after an interruption."""
    with needs_extra("train"):
        from cllm_export.training.collect import CollectOptions, check_collection_output
        from cllm_export.training.collect import collect as run
        from cllm_export.training.source import open_source

        options = CollectOptions(
            method=method,
            block_size=block_size,
            fill=fill,
            seed=seed,
            max_new_tokens=max_new_tokens,
            shard_size=shard_size,
            limit=limit,
        )
        check_collection_output(output)
        opened = open_source(source, batch_size=batch_size, threads=threads, device=device)
        with display.progress_bar() as progress:
            collection = run(opened, prompts, output, options, progress=progress)
    if as_json:
        typer.echo(json.dumps(collection.manifest.summary, indent=2))
    else:
        display.show_collection(str(output), collection.manifest.summary or {})
    if not len(collection):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.", show_default=False)],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts", help="Prompts with answers; without, the model answers them first.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.", show_default=False)],
    trajectories: Annotated[
        Path | None, typer.Option("--trajectories", help="What `collect` wrote: train on it instead of the answers.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="Prompts with answers to measure on; by default the last ones.")
    ] = None,
    num_held_out: Annotated[int, typer.Option("--num-held-out", help="How many to measure on.")] = 64,
    limit: LimitOption = None,
    objective: Annotated[
        Objective, typer.Option("--objective", help="autoregressive is ordinary fine-tuning, as a control.")
    ] = "packed",
    block_sizes: Annotated[
        list[int] | None,
        typer.Option("--block-size", help="n; 16 by default. Several mix; the first is to be deployed."),
    ] = None,
    loop: Annotated[Loop, typer.Option("--loop", help="The loop that will be deployed.")] = "sliding",
    fill: Annotated[FillName, typer.Option("--fill", help="The fill that will be deployed.")] = "pad",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Minutes of training, instead of steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples a forward and process.")] = 32,
    gradient_accumulation: Annotated[int, typer.Option("--gradient-accumulation", help="Forwards a step.")] = 1,
    num_windows: Annotated[int, typer.Option("--num-windows", help="Noisy states of a sample in a forward.")] = 6,
    autoregressive_weight: Annotated[
        float, typer.Option("--autoregressive-weight", help="Of the ordinary loss: too little, and models collapse.")
    ] = 1.0,
    distance_weight: Annotated[
        float, typer.Option("--distance-weight", help="Below 1: guesses count less, the further they are ahead.")
    ] = 1.0,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", help="Of the ordinary loss.")] = 0.0,
    optimizer: Annotated[OptimizerName, typer.Option("--optimizer", help="muon is for small models.")] = "adamw",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak, of adamw.")] = 2e-5,
    matrix_learning_rate: Annotated[float, typer.Option("--matrix-learning-rate", help="Peak, of muon.")] = 0.02,
    decay: Annotated[float, typer.Option("--decay", help="Share of the run over which it falls to zero.")] = 0.6,
    mixed_precision: Annotated[MixedPrecision, typer.Option("--mixed-precision", help="As accelerate's.")] = "no",
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Train adapters; merged when saved.")] = None,
    lora_alpha: Annotated[float | None, typer.Option("--lora-alpha", help="By default twice the rank.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Prompt and answer, in tokens.")] = None,
    evaluate_every: Annotated[
        float, typer.Option("--evaluate-every", help="Share of the run between held-out decodes, and saves.")
    ] = 0.1,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many held-out decodes without progress.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of order and states.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of each process.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run's output.")] = False,
) -> None:
    """Turn a checkpoint into a CLLM, or a better one; start it with `accelerate launch` for several processes."""
    with needs_extra("train"):
        from cllm_export.training.command import run_tune
        from cllm_export.training.tune_options import TuneOptions

    options = TuneOptions(
        objective=objective,
        block_sizes=tuple(block_sizes or (16,)),
        loop=loop,
        fill=fill,
        num_windows=num_windows,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        autoregressive_weight=autoregressive_weight,
        distance_weight=distance_weight,
        label_smoothing=label_smoothing,
        optimizer=optimizer,
        learning_rate=learning_rate,
        matrix_learning_rate=matrix_learning_rate,
        decay=decay,
        max_length=max_length,
        mixed_precision=mixed_precision,
        lora=_lora_options(lora_rank, lora_alpha),
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        evaluate_every=evaluate_every,
        patience=patience,
    )
    with display.progress_bar() as progress:
        report = run_tune(
            checkpoint,
            prompts,
            output,
            options,
            trajectories=trajectories,
            held_out=held_out,
            num_held_out=num_held_out,
            limit=limit,
            threads=threads,
            resume=resume,
            force=force,
            progress=progress,
        )
    if report is None:  # not the first of several processes
        return
    display.show_tuning(str(output), report)
    if report["stopped"] == "collapse":
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo(
    example: Annotated[
        Path, typer.Option("--example", help="A directory with `checkpoint/` and `prompts.jsonl`.")
    ] = Path("examples/text_to_sql"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle goes.")] = Path("demo-bundle"),
    threads: ThreadsOption = None,
) -> None:
    """Build the example's bundle, verify it, decode a few prompts and print the speed table."""
    from cllm_export.demo import run_demo

    with needs_extra("export"):
        if not run_demo(example, output, threads=threads):
            raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """Entry point of ``cllm-export``: errors become one message and an exit code, never a traceback."""
    debug = _take_debug_flag(sys.argv)
    try:
        app()
    except CllmExportError as error:
        _fail(str(error), EXIT_ERROR, error if debug else None)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"the system refused: {error.strerror or error}{where}", EXIT_ERROR, error if debug else None)
    except Exception as error:
        message = (
            f"{type(error).__name__}: {error}; this is a defect of cllm-export: run again with --debug and report it"
        )
        _fail(message, EXIT_DEFECT, error if debug else None)


def _take_debug_flag(argv: list[str]) -> bool:
    """Remove --debug from anywhere before a bare ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    argv[:end] = [argument for argument in argv[:end] if argument != "--debug"]
    return debug


def _fail(message: str, code: int, cause: BaseException | None = None) -> None:
    if cause is not None:
        traceback.print_exception(cause)
    display.ERR.print("[bold red]error:[/bold red]", end=" ")
    display.ERR.print(message, markup=False)
    sys.exit(code)


@contextmanager
def _naming(prompt: Prompt, total: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"prompt {prompt.id}: {error}" if total > 1 else str(error)) from None


def _parse_block_size(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise OptionError(f"--block-size must be an integer or auto, got {text!r}")
    return int(text)


def _trained_with(block_size: int | None, fill: FillName | None, loop: Loop | None) -> TrainedWith | None:
    if block_size is None:
        if fill or loop:
            raise OptionError("--trained-fill and --trained-loop need --trained-block-size")
        return None
    return TrainedWith(block_size=block_size, fill=fill or "pad", loop=loop or "sliding")


def _lora_options(rank: int | None, alpha: float | None) -> LoraOptions | None:
    from cllm_export.training.lora import LoraOptions

    if rank is None:
        if alpha is not None:
            raise OptionError("--lora-alpha needs --lora-rank")
        return None
    return LoraOptions(rank=rank, alpha=2 * rank if alpha is None else alpha)


def _require_use(draft_model: Path | None, method: Method | None, fill: str | None) -> None:
    """Refuse a draft model that nothing would ask."""
    is_asked = "model" in parse_fill(fill) if fill else method == "speculative"
    if draft_model and not is_asked:
        raise OptionError("--draft-model needs --method speculative, or --fill with model among its sources")


def _methods_to_time(method: Method | None, *, has_draft_model: bool) -> tuple[Method, ...]:
    """The baseline and the method asked for, else every loop: speculative decoding where a draft model is given."""
    from cllm_export.bench import DEFAULT_METHODS

    if method:
        return (method,) if method == "autoregressive" else (method, "autoregressive")
    return METHODS if has_draft_model else DEFAULT_METHODS


def _gather_prompts(prompt: str | None, path: Path | None, limit: int | None) -> list[Prompt]:
    if prompt is not None and path is not None:
        raise OptionError("give a prompt or --prompts, not both")
    if prompt is not None and limit is not None:
        raise OptionError("--limit is for several prompts; leave it out")
    if prompt is not None:
        return [Prompt(id="1", content=prompt)]
    if path is not None:
        return read_prompts(path, limit=limit)
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("no prompt: give one as an argument, with --prompts FILE, or on standard input")
    return _read_stdin(limit)


def _read_stdin(limit: int | None) -> list[Prompt]:
    """JSON Lines if it starts with a brace, else the whole text as one prompt, less the newline that ends it."""
    data = sys.stdin.buffer.read()
    if data.lstrip()[:1] == b"{":
        return parse_prompts(data, source="standard input", limit=limit)
    try:
        text = data.decode("utf-8")
        return [Prompt(id="1", content=text.removesuffix("\n").removesuffix("\r"))]
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not valid UTF-8 at byte {error.start}") from None


def _print_json_line(prompt: Prompt, generation: Generation) -> None:
    line = {
        "id": prompt.id,
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "stats": generation.statistics.to_dict(),
    }
    if generation.logprobs is not None:
        line["logprobs"] = [entry._asdict() for entry in generation.logprobs]
    typer.echo(json.dumps(line, ensure_ascii=False))


def _read_grammar(path: Path | None, flag: str) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{flag}: cannot read {path}: {error}") from None


def _parse_bias(given: Sequence[str]) -> dict[int, float]:
    """``TOKEN=BIAS`` options as what ``Options.logit_bias`` takes."""
    biases = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise OptionError(f"--logit-bias takes TOKEN=BIAS, a token id and a number, got {text!r}") from None
    return biases


def _slots_for(bundle: Path, num_prompts: int) -> int | None:
    """The bundle's own number of slots, and no more than there are prompts where a forward may have fewer."""
    manifest = open_bundle(bundle).manifest
    pinned = manifest.graphs[GREEDY_GRAPH].fixed_shapes
    return None if pinned else min(manifest.batch_size, max(1, num_prompts))


def _decode_together(
    model: Model, given: Sequence[Prompt], options: dict[str, Any]
) -> Iterator[tuple[Prompt, Generation]]:
    """Every prompt and what it gives, in order, decoded as many at once as there are slots."""
    from cllm_export.runtime.service import Handle, Service

    block_size, is_pinned = options.pop("block_size"), options.pop("deterministic")
    if block_size == "auto" and is_pinned:
        raise OptionError("--block-size auto and --deterministic exclude each other: leave one out")
    waiting: deque[tuple[Prompt, Handle]] = deque()
    with Service(model, block_size=block_size) as service:
        for entry in given:
            with _naming(entry, len(given)):
                waiting.append((entry, service.submit(entry.content, **options)))
            if len(waiting) > 2 * model.engine.num_slots:
                first, handle = waiting.popleft()
                yield first, handle.result()
        for entry, handle in waiting:
            yield entry, handle.result()


def _print_together(
    model: Model, given: Sequence[Prompt], options: dict[str, Any], *, as_json: bool, stats: bool, blocks: bool
) -> None:
    for entry, generation in _decode_together(model, given, options):
        if as_json:
            _print_json_line(entry, generation)
        else:
            _print_generation(model, generation, stats=stats, blocks=blocks)


def _print_generation(model: Model, generation: Generation, *, stats: bool, blocks: bool) -> None:
    if blocks:
        display.show_blocks(model, generation)
    else:
        typer.echo(generation.text)
    if stats:
        display.show_statistics(generation)


def _print_text(model: Model, prompt: Prompt, options: dict[str, Any], *, stats: bool, blocks: bool) -> None:
    with model.stream(prompt.content, **options) as stream:
        if blocks:
            _print_generation(model, stream.result(), stats=stats, blocks=True)
            return
        for delta in stream:
            typer.echo(delta, nl=False)
            sys.stdout.flush()
        typer.echo()
        if stats:
            display.show_statistics(stream.result())


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise OptionError(f"--sweep must be block sizes such as 4,8,12, got {text!r}") from None


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    main()
