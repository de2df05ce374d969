"""`generate` and `trace`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm_export.bundle.manifest import GREEDY_GRAPH, FillName, open_bundle
from cllm_export.cli.app import app
from cllm_export.cli.options import (
    BlockSizeOption,
    BundleArgument,
    ChosenBlockSizeOption,
    DraftModelOption,
    GuessesOption,
    LimitOption,
    MaxNewTokensOption,
    NGramOption,
    PromptsOption,
    SourcesOption,
    ThreadsOption,
    WindowOption,
    parse_block_size,
    require_use,
    write_text,
)
from cllm_export.cli.show.decoding import show_blocks, show_statistics
from cllm_export.errors import OptionError, PromptError
from cllm_export.prompts import Prompt, parse_prompts, read_prompts
from cllm_export.runtime.decode_all import decode_all
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.load import Provider, load
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import Generation


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
    require_use(draft_model, method, fill)
    given = _gather_prompts(prompt, prompts, limit)
    if save_prefix is not None:
        if len(given) != 1:
            raise OptionError(f"--save-prefix keeps the state of one prompt, got {len(given)} prompts")
        check_target(save_prefix)
    slots = num_slots or (_slots_for(bundle, len(given)) if provider != "tensorrt" else None)
    options: dict[str, Any] = {
        "method": method,
        "block_size": parse_block_size(block_size),
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
    from cllm_export.measure.traces import DEFAULT_METHODS, record_traces

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
    write_text(output, json.dumps(traces) + "\n")
    typer.echo(f"wrote {output} ({len(traces['traces'])} traces)")


@contextmanager
def _naming(prompt: Prompt, total: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"prompt {prompt.id}: {error}" if total > 1 else str(error)) from None


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


def _print_together(
    model: Model, given: Sequence[Prompt], options: dict[str, Any], *, as_json: bool, stats: bool, blocks: bool
) -> None:
    def refused(index: int, error: PromptError) -> None:
        raise PromptError(f"prompt {given[index].id}: {error}")

    contents = [entry.content for entry in given]
    for index, _, generation in decode_all(model, contents, in_slots=True, refused=refused, **options):
        if as_json:
            _print_json_line(given[index], generation)
        else:
            _print_generation(model, generation, stats=stats, blocks=blocks)


def _print_generation(model: Model, generation: Generation, *, stats: bool, blocks: bool) -> None:
    if blocks:
        show_blocks(model, generation)
    else:
        typer.echo(generation.text)
    if stats:
        show_statistics(generation)


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
            show_statistics(stream.result())
