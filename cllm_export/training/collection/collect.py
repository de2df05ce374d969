"""Collects Jacobi trajectories: decodes every prompt in the form that will be deployed, and records every state.

The prompt file is split into ranges of ``shard_size`` prompts. Each range becomes one shard, which depends only on the
settings and its own prompts. A collection interrupted at any time continues with the next shard, and ends with the same
bytes as an uninterrupted one. With another batch size or engine, rounding may flip a near tie of the model. Nothing
else differs, because each prompt has its own proposer seed, made from the seed, its number and its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.storage import locked_directory, sha256_of, unfinished_files
from cllm_export.errors import OutputError
from cllm_export.progress import Progress, resumable
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.model import Model
from cllm_export.training.collection.collection import (
    CollectionManifest,
    CollectionSettings,
    check_collection_output,
    check_shards,
    read_manifest,
    write_manifest,
)
from cllm_export.training.collection.collection_range import LOOP_OF_METHOD, decode_range
from cllm_export.training.collection.collection_summary import summarize_collection
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.collection.shards import write_shard
from cllm_export.training.collection.source import Source
from cllm_export.training.collection.trajectories import Trajectories


def collect(
    source: Source,
    prompts_path: Path,
    output: Path,
    options: CollectOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Trajectories:
    """Collect the trajectories of a prompt file into a directory. Continues an earlier run with the same settings.

    Raises:
        PromptError: the prompt file is missing or malformed. A prompt that is empty, too long or does not tokenise is
            dropped and counted.
        OutputError: the directory holds another collection, another run writes to it, or it cannot be written.
        TrajectoryError: a shard of the earlier run is damaged.
        OptionError: an option is out of range.
        EngineError: the engine failed.
    """
    check_collection_output(output)
    options, progress = options or CollectOptions(), progress or (lambda *_: None)
    prompts = read_prompts(prompts_path, limit=options.limit)
    settings = _settle(source, prompts_path, len(prompts), options)
    with _locked(output):
        manifest = _begin(output, settings)
        with resumable(lambda: _describe(output)):
            _collect_shards(source.model, prompts, output, manifest, progress)
            progress("summing up", 0, 1)
            return Trajectories(output, _finish(output))


def _settle(source: Source, prompts_path: Path, num_prompts: int, options: CollectOptions) -> CollectionSettings:
    facts, geometry, pinned = source.model.facts, source.model.engine.geometry, source.model.engine.fixed_shapes
    trained = facts.trained_with
    block_size = options.block_size or (pinned.block_size if pinned else facts.block_size)
    check_block_size(block_size, largest=geometry.max_block_size, pinned=pinned.block_size if pinned else None)
    return CollectionSettings(
        model_fingerprint=source.model_fingerprint,
        bundle_fingerprint=source.bundle_fingerprint,
        tokenizer_sha256=source.tokenizer_sha256,
        prompts_sha256=sha256_of(prompts_path),
        num_prompts=num_prompts,
        engine=source.engine,
        device=source.device,
        loop=LOOP_OF_METHOD[options.method] if options.method else (trained.loop if trained else "sliding"),
        proposer=options.proposer or (trained.proposer if trained else "pad"),
        block_size=block_size,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        max_length=facts.max_length,
        batch_size=source.batch_size,
        shard_size=options.shard_size,
    )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Lock the directory for this run, and remove unfinished files of a killed run."""
    busy = f"another run is collecting into {output}: wait for it, or choose another output"
    with locked_directory(output, busy=busy):
        for left in unfinished_files(output):
            left.unlink(missing_ok=True)
        yield


def _begin(output: Path, settings: CollectionSettings) -> CollectionManifest:
    """The manifest to continue: a new one, or that of an earlier run with the same settings."""
    found = read_manifest(output)
    if found is None:
        manifest = CollectionManifest(settings=settings)
        write_manifest(output, manifest)
        return manifest
    for entry in fields(CollectionSettings):
        theirs, ours = getattr(found.settings, entry.name), getattr(settings, entry.name)
        if theirs != ours:
            raise OutputError(
                f"{output} holds a collection with {entry.name} {theirs!r}, this one has {ours!r}: "
                "choose another output, or remove the directory",
                fields=("output",),
            )
    check_shards(output, found)
    return found


def _collect_shards(
    model: Model, prompts: Sequence[Prompt], output: Path, manifest: CollectionManifest, progress: Progress
) -> None:
    size, total = manifest.settings.shard_size, len(prompts)
    for number in range(len(manifest.shards), manifest.settings.num_shards):
        start = number * size
        progress("collecting", start, total)

        def report(done: int, start: int = start) -> None:
            progress("collecting", start + done, total)

        rows, dropped = decode_range(model, prompts[start : start + size], start, manifest.settings, report)
        shard = write_shard(output, number, rows, dropped)
        manifest = replace(manifest, shards=(*manifest.shards, shard))
        write_manifest(output, manifest)


def _describe(output: Path) -> str:
    """What an interruption leaves, and how to go on."""
    found = read_manifest(output)
    num_shards = len(found.shards) if found else 0
    of_shards = found.settings.num_shards if found else 0
    return f"{output} keeps {num_shards} of {of_shards} shards: run the same command again to go on"


def _finish(output: Path) -> CollectionManifest:
    """Add the summary to the manifest, after every shard is listed."""
    manifest = read_manifest(output)
    assert manifest is not None
    if manifest.summary is None:
        summary = summarize_collection(output, manifest.settings, manifest.shards)
        manifest = replace(manifest, summary=summary)
        write_manifest(output, manifest)
    return manifest
