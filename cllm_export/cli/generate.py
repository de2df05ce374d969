"""`generate` and `trace`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import GREEDY_GRAPH, ProposerName, open_bundle
from cllm_export.bundle.storage import write_text
from cllm_export.checks import check_options, option
from cllm_export.cli.app import app
from cllm_export.cli.before.arguments import check_bundle, check_counts, check_new_tokens, check_prefix, check_report
from cllm_export.cli.options import (
    BlockSizeOption,
    BundleArgument,
    LimitOption,
    MaxNewTokensOption,
    PromptFileOption,
    PromptsOption,
    ThreadsOption,
    require_use,
)
from cllm_export.cli.show.decoding import show_blocks, show_statistics
from cllm_export.cli.signature import with_options
from cllm_export.errors import OptionError, PromptError, about
from cllm_export.prompts import Prompt, parse_prompts, read_prompts
from cllm_export.runtime.decode_all import decode_all
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.decoding.shared_options import threads_option
from cllm_export.runtime.load import PROVIDERS, Provider, load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import BlockSize, GenerateOptions, resolve
from cllm_export.runtime.request_run import Generation


def _parse_block_size(text: str) -> BlockSize:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit():
        raise OptionError(f"block_size must be an integer or auto, got {text!r}", fields=("block_size",))
    return int(text)


def _parse_bias(given: list[str]) -> dict[int, float]:
    """Parse ``TOKEN=BIAS`` texts for ``GenerateOptions.logit_bias``."""
    biases = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise OptionError(
                f"logit_bias takes TOKEN=BIAS, a token id and a number, got {text!r}", fields=("logit_bias",)
            ) from None
    return biases


def _read_file(path: str, *, name: str) -> str:
    """The text of a file that an option names."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{name}: cannot read {path}: {error.strerror}", fields=(name,)) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{name}: {path} is not valid UTF-8 at byte {error.start}", fields=(name,)) from None


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Options that choose the engine."""

    draft_model: Path | None = option(
        None, help="Another bundle with the same tokenizer, which drafts for --method speculative or --proposer model."
    )
    num_slots: int | None = option(
        None,
        minimum=1,
        help="Number of prompts decoded at once, all at one block size; by default the bundle's batch size.",
    )
    threads: int | None = threads_option()
    provider: Provider = option(
        "cpu",
        choices=PROVIDERS,
        help="What runs the bundle: ONNX Runtime on cpu or cuda, or the bundle's plan by tensorrt.",
    )
    cuda_graphs: bool = option(False, help="For cuda: let ONNX Runtime record forwards as CUDA graphs and replay them.")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, bundle: Path, *, num_prompts: int) -> Model:
        """Load the model with as many slots as this number of prompts needs."""
        slots = self.num_slots
        if slots is None and self.provider != "tensorrt":
            slots = _slots_for(bundle, num_prompts)
        return load(
            bundle,
            threads=self.threads,
            num_slots=slots,
            draft_model=self.draft_model,
            provider=self.provider,
            cuda_graphs=self.cuda_graphs,
        )


@dataclass(frozen=True, kw_only=True)
class View:
    """Options that choose how a generation is shown."""

    as_json: bool = option(False, flag="--json", help="Print a JSON line for each prompt.")
    stats: bool = option(False, help="Print statistics on standard error.")
    show_blocks: bool = option(False, help="Print every block; its colours tell which tokens were accepted.")

    def __post_init__(self) -> None:
        if self.as_json and (self.show_blocks or self.stats):
            raise OptionError(
                "as_json excludes show_blocks and stats: its lines have the statistics",
                fields=("as_json", "show_blocks", "stats"),
            )


@app.command()
@with_options(
    GenerateOptions,
    parse={
        "block_size": _parse_block_size,
        "logit_bias": _parse_bias,
        "json_schema": partial(_read_file, name="json_schema"),
        "grammar": partial(_read_file, name="grammar"),
    },
    metavars={
        "block_size": "N|auto",
        "proposer": "SOURCES",
        "logit_bias": "TOKEN=BIAS",
        "json_schema": "FILE",
        "grammar": "FILE",
    },
)
@with_options(EngineChoice)
@with_options(View)
def generate(
    bundle: BundleArgument,
    options: GenerateOptions,
    engine: EngineChoice,
    view: View,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The prompt; without it and without --prompts, standard input is read.", show_default=False
        ),
    ] = None,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    load_prefix: Annotated[
        Path | None,
        typer.Option("--load-prefix", help="Start from the state of a prompt that --save-prefix wrote to this file."),
    ] = None,
    save_prefix: Annotated[
        Path | None,
        typer.Option("--save-prefix", help="Write the state of the prompt to this file, for --load-prefix."),
    ] = None,
) -> None:
    """Decode prompts: from the command line, a file, or standard input."""
    if options.logprobs is not None and not view.as_json:
        raise OptionError("logprobs needs as_json: they stand in its lines", fields=("logprobs", "as_json"))
    require_use(engine.draft_model, options.method, options.proposer)
    given = _gather_prompts(prompt, prompts, limit)
    if save_prefix is not None:
        if len(given) != 1:
            raise OptionError(f"save_prefix keeps the state of one prompt, got {len(given)} prompts")
        with about("save_prefix"):
            check_target(save_prefix)
        check_report("save_prefix", save_prefix)
    check_bundle("bundle", bundle, block_sizes=[options.block_size if options.block_size != "auto" else None])
    check_new_tokens(bundle, options.max_new_tokens)
    check_bundle("draft_model", engine.draft_model)
    check_prefix(load_prefix)
    with engine.load(bundle, num_prompts=len(given)) as model:
        if load_prefix is not None:
            model.load_prefix(load_prefix)
        _check_all(model, given, options)
        if len(given) > 1 and model.engine.num_slots > 1 and options.forwards_per_sync is None:
            _print_together(model, given, options, view)
            return
        for entry in given:
            with _naming(entry, len(given)):
                if view.as_json:
                    _print_json_line(entry, model.generate(entry.content, options))
                else:
                    _print_text(model, entry, options, view)
                if save_prefix is not None:
                    model.save_prefix(save_prefix, entry.content)


@app.command()
def trace(
    bundle: BundleArgument,
    prompts: PromptFileOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.", show_default=False)],
    method: Annotated[
        Method | None, typer.Option("--method", help="Record this method alone; by default all methods.")
    ] = None,
    block_size: BlockSizeOption = None,
    proposer: Annotated[
        ProposerName, typer.Option("--proposer", help="How guesses are first filled and refilled: pad or repeat.")
    ] = "pad",
    max_new_tokens: MaxNewTokensOption = 32,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Record every forward of a few requests, for those who write the loop in another language: see docs/loop.md."""
    from cllm_export.measure.traces import DEFAULT_METHODS, record_traces

    check_counts(threads=threads)
    check_bundle("bundle", bundle, block_sizes=[block_size])
    check_report("output", output)
    with about("prompts"):
        given = read_prompts(prompts, limit=limit)
    with load(bundle, threads=threads) as model:
        traces = record_traces(
            open_bundle(bundle),
            model,
            given,
            methods=(method,) if method else DEFAULT_METHODS,
            block_size=block_size,
            proposer=proposer,
            max_new_tokens=max_new_tokens,
        )
    write_text(output, json.dumps(traces) + "\n")
    typer.echo(f"wrote {output} ({len(traces['traces'])} traces)")


def _check_all(model: Model, given: Sequence[Prompt], options: GenerateOptions) -> None:
    """Refuse a prompt that does not fit before any prompt is decoded, so that no answer is lost or comes twice."""
    for entry in given:
        with _naming(entry, len(given)):
            resolve(options, model.limits, model.encode(entry.content))


@contextmanager
def _naming(prompt: Prompt, total: int) -> Iterator[None]:
    """Name the prompt in errors if there are several prompts."""
    try:
        yield
    except PromptError as error:
        if total == 1:
            raise
        raise PromptError(f"prompt {prompt.id}: {error}", fields=error.fields) from None


def _gather_prompts(prompt: str | None, path: Path | None, limit: int | None) -> list[Prompt]:
    if prompt is not None and path is not None:
        raise OptionError("give a prompt or --prompts, not both")
    if prompt is not None and limit is not None:
        raise OptionError("--limit is for several prompts; leave it out")
    if prompt is not None:
        return [Prompt(id="1", content=prompt)]
    if path is not None:
        with about("prompts"):
            return read_prompts(path, limit=limit)
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("no prompt: give one as an argument, with --prompts FILE, or on standard input")
    return _read_stdin(limit)


def _read_stdin(limit: int | None) -> list[Prompt]:
    """Read standard input: JSON Lines if it starts with a brace, else one prompt without its final newline."""
    data = sys.stdin.buffer.read()
    if data.lstrip()[:1] == b"{":
        return parse_prompts(data, source="standard input", limit=limit)
    if limit is not None:
        raise OptionError("limit is for several prompts; leave it out", fields=("limit",))
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


def _slots_for(bundle: Path, num_prompts: int) -> int | None:
    """The bundle's own number of slots, but at most the number of prompts, unless the bundle is pinned."""
    manifest = open_bundle(bundle).manifest
    pinned = manifest.graphs[GREEDY_GRAPH].fixed_shapes
    return None if pinned else min(manifest.batch_size, max(1, num_prompts))


def _print_together(model: Model, given: Sequence[Prompt], options: GenerateOptions, view: View) -> None:
    def refused(index: int, error: PromptError) -> None:
        raise PromptError(f"prompt {given[index].id}: {error}")

    contents = [entry.content for entry in given]
    for index, _, generation in decode_all(model, contents, options, in_slots=True, refused=refused):
        if view.as_json:
            _print_json_line(given[index], generation)
        else:
            _print_generation(model, generation, view)


def _print_generation(model: Model, generation: Generation, view: View) -> None:
    if view.show_blocks:
        show_blocks(model, generation)
    else:
        typer.echo(generation.text)
    if view.stats:
        show_statistics(generation)


def _print_text(model: Model, prompt: Prompt, options: GenerateOptions, view: View) -> None:
    with model.stream(prompt.content, options) as stream:
        if view.show_blocks:
            _print_generation(model, stream.result(), view)
            return
        for delta in stream:
            typer.echo(delta, nl=False)
            sys.stdout.flush()
        typer.echo()
        if view.stats:
            show_statistics(stream.result())
