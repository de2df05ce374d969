"""`generate` and `trace`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from cllm_export.bundle.manifest import GREEDY_GRAPH, ProposerName, open_bundle
from cllm_export.bundle.storage import write_text
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.cli.app import command
from cllm_export.cli.before.arguments import check_bundle, check_counts, check_plan, check_prefix, check_report
from cllm_export.cli.before.commands import check_generate
from cllm_export.cli.options import (
    BlockSizeOption,
    BundleArgument,
    ForceOption,
    LimitOption,
    MaxNewTokensOption,
    PromptFileOption,
    PromptsOption,
    ThreadsOption,
    given,
    require_use,
)
from cllm_export.cli.show.console import plain_progress, streaming_text
from cllm_export.cli.show.decoding import show_blocks, show_if_cut, show_if_empty, show_legend, show_statistics
from cllm_export.cli.signature import with_options
from cllm_export.errors import GrammarError, OptionError, PromptError, about
from cllm_export.progress import Progress, counted
from cllm_export.prompts import Prompt, parse_stdin, read_prompts
from cllm_export.runtime.decode_all import decode_all
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_target
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.decoding.shared_options import num_slots_option, threads_option
from cllm_export.runtime.load import Provider, load, plan_option, provider_option
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
    if path.lstrip().startswith("{") or "\n" in path:
        raise OptionError(
            f"{name} takes a file, and this is the text itself: write it to a file, and give the file's path, got "
            f"{path.strip()[:40]!r}",
            fields=(name,),
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{name}: cannot read {path}: {error.strerror}", fields=(name,)) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{name}: {path} is not valid UTF-8 at byte {error.start}", fields=(name,)) from None


PARSE: dict[str, Callable[..., Any]] = {
    "block_size": _parse_block_size,
    "logit_bias": _parse_bias,
    "json_schema": partial(_read_file, name="json_schema"),
    "grammar": partial(_read_file, name="grammar"),
}
METAVARS = {
    "block_size": "N|auto",
    "proposer": "SOURCES",
    "stop": "TEXT",
    "regex": "PATTERN",
    "logit_bias": "TOKEN=BIAS",
    "json_schema": "FILE",
    "grammar": "FILE",
}
"""How the command line writes options of a request."""


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Options that choose the engine."""

    GROUP: ClassVar[OptionGroup] = "Machine"

    draft_model: Path | None = option(
        None,
        help="Another bundle with the same tokenizer, which drafts for --method speculative or --proposer model.",
        group="Decoding",
    )
    num_slots: int | None = num_slots_option(
        help="Number of prompts decoded at once, all at one block size.", otherwise="the bundle's batch size"
    )
    threads: int | None = threads_option()
    provider: Provider = provider_option()
    plan: str | None = plan_option()
    cuda_graphs: bool = option(False, help="For cuda: let ONNX Runtime record forwards as CUDA graphs and replay them.")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, bundle: Path, *, num_prompts: int) -> Model:
        """Load the model with as many slots as this number of prompts needs."""
        slots = self.num_slots
        if slots is None and self.provider in ("cpu", "cuda"):
            slots = _slots_for(bundle, num_prompts)
        return load(
            bundle,
            threads=self.threads,
            num_slots=slots,
            draft_model=self.draft_model,
            provider=self.provider,
            cuda_graphs=self.cuda_graphs,
            plan=self.plan,
        )


@dataclass(frozen=True, kw_only=True)
class View:
    """Options that choose how a generation is shown."""

    GROUP: ClassVar[OptionGroup] = "Output"

    as_json: bool = option(False, flag="--json", help="Print a JSON line for each prompt.")
    stats: bool = option(False, help="Print statistics on standard error.")
    show_blocks: bool = option(
        False, help="Print every block, then the text; marks and colours tell what was accepted."
    )

    def __post_init__(self) -> None:
        if self.as_json and (self.show_blocks or self.stats):
            raise OptionError(
                "as_json excludes show_blocks and stats: its lines have the statistics",
                fields=("as_json", "show_blocks", "stats"),
            )


@command("cllm-export generate my-bundle --prompts prompts.jsonl --max-new-tokens 64")
@with_options(
    GenerateOptions,
    parse=PARSE,
    metavars=METAVARS,
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
        given("--load-prefix", "Start from the state of a prompt that --save-prefix wrote to this file.", "Input"),
    ] = None,
    save_prefix: Annotated[
        Path | None,
        given("--save-prefix", "Write the state of the prompt to this file, for --load-prefix.", "Output"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Decode prompts: from the command line, a file, or standard input."""
    if options.logprobs is not None and not view.as_json:
        raise OptionError("logprobs needs as_json: they stand in its lines", fields=("logprobs", "as_json"))
    require_use(engine.draft_model, options.method, options.proposer)
    entries = _gather_prompts(prompt, prompts, limit)
    if save_prefix is not None:
        if len(entries) != 1:
            raise OptionError(f"save_prefix keeps the state of one prompt, got {len(entries)} prompts")
        with about("save_prefix"):
            check_target(save_prefix)
        check_report("save_prefix", save_prefix, force=force)
    check_plan(bundle, engine.provider, engine.plan)
    check_generate(bundle, options, draft_model=engine.draft_model)
    check_prefix(load_prefix)
    progress = plain_progress()
    with engine.load(bundle, num_prompts=len(entries)) as model:
        if load_prefix is not None:
            model.load_prefix(load_prefix)
        _check_all(model, entries, options)
        if view.show_blocks:
            show_legend()
        if len(entries) > 1 and model.engine.num_slots > 1 and options.forwards_per_sync is None:
            _print_together(model, entries, options, view, progress)
            return
        for index, entry in enumerate(entries):
            progress("prompts", index, len(entries))
            with _naming(entry, len(entries)):
                if view.as_json:
                    generation = model.generate(entry.content, options)
                    _print_json_line(entry, generation)
                    show_if_cut(generation, options, _named(entry, is_alone=len(entries) == 1))
                else:
                    _print_text(model, entry, options, view, is_alone=len(entries) == 1)
                if save_prefix is not None:
                    model.save_prefix(save_prefix, entry.content)


@command("cllm-export trace my-bundle --prompts prompts.jsonl --output traces.json")
def trace(
    bundle: BundleArgument,
    prompts: PromptFileOption,
    output: Annotated[Path, given("--output", "The JSON file to write.", "Output", "-o")],
    method: Annotated[
        Method | None, given("--method", "Record this method alone.", "Decoding", default="all methods")
    ] = None,
    block_size: BlockSizeOption = None,
    proposer: Annotated[
        ProposerName, given("--proposer", "How guesses are first filled and refilled: pad or repeat.", "Decoding")
    ] = "pad",
    max_new_tokens: MaxNewTokensOption = 32,
    limit: LimitOption = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Record every forward of a few requests, for those who write the loop in another language: see docs/loop.md."""
    from cllm_export.measure.traces import DEFAULT_METHODS, record_traces

    check_counts(threads=threads)
    check_bundle("bundle", bundle, block_sizes=[block_size])
    check_report("output", output, force=force)
    with about("prompts"):
        entries = read_prompts(prompts, limit=limit)
    methods = (method,) if method else DEFAULT_METHODS
    with load(bundle, threads=threads) as model:
        traces = record_traces(
            open_bundle(bundle),
            model,
            entries,
            methods=methods,
            block_size=block_size,
            proposer=proposer,
            max_new_tokens=max_new_tokens,
        )
    write_text(output, json.dumps(traces) + "\n")
    typer.echo(f"wrote {output} ({counted(len(entries), 'prompt')}, {counted(len(methods), 'method')} each)")


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
    except (PromptError, GrammarError) as error:
        if total == 1:
            raise
        raise type(error)(f"prompt {prompt.id}: {error}", fields=error.fields) from None


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
    return parse_stdin(sys.stdin.buffer.read(), limit=limit)


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


def _print_together(
    model: Model, given: Sequence[Prompt], options: GenerateOptions, view: View, progress: Progress
) -> None:
    def refused(index: int, error: PromptError) -> None:
        raise PromptError(f"prompt {given[index].id}: {error}")

    contents = [entry.content for entry in given]
    decoded = decode_all(
        model,
        contents,
        options,
        in_slots=True,
        refused=refused,
        progress=lambda done: progress("prompts", done, len(given)),
    )
    for index, _, generation in decoded:
        if view.as_json:
            _print_json_line(given[index], generation)
            show_if_cut(generation, options, _named(given[index], is_alone=False))
        else:
            _print_generation(model, given[index], generation, options, view)


def _print_generation(
    model: Model,
    prompt: Prompt,
    generation: Generation,
    options: GenerateOptions,
    view: View,
    *,
    is_alone: bool = False,
) -> None:
    if view.show_blocks:
        if not is_alone:
            typer.echo(f"prompt {prompt.id}")
        show_blocks(model, generation)
        typer.echo(f"text: {generation.text}")
    else:
        typer.echo(generation.text)
    _print_remarks(prompt, generation, options, view, is_alone=is_alone)


def _print_remarks(
    prompt: Prompt, generation: Generation, options: GenerateOptions, view: View, *, is_alone: bool
) -> None:
    """Print on standard error what is to be said of a text that was printed."""
    name = _named(prompt, is_alone=is_alone)
    show_if_empty(generation, name)
    show_if_cut(generation, options, name)
    if view.stats:
        show_statistics(generation)


def _named(prompt: Prompt, *, is_alone: bool) -> str:
    """The beginning of a remark: which prompt it is about, if there are several."""
    return "" if is_alone else f"prompt {prompt.id}: "


def _print_text(model: Model, prompt: Prompt, options: GenerateOptions, view: View, *, is_alone: bool) -> None:
    with model.stream(prompt.content, options) as stream:
        if view.show_blocks:
            _print_generation(model, prompt, stream.result(), options, view, is_alone=is_alone)
            return
        with streaming_text():
            for delta in stream:
                typer.echo(delta, nl=False)
                sys.stdout.flush()
            typer.echo()
        _print_remarks(prompt, stream.result(), options, view, is_alone=is_alone)
