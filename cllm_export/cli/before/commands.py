"""What a command can refuse before it imports an engine or torch."""

from __future__ import annotations

from pathlib import Path

from cllm_export.bundle.storage import check_output
from cllm_export.calibration.search.budget import FitOptions
from cllm_export.cli.before.arguments import (
    check_bundle,
    check_checkpoint_or_adapter,
    check_gguf_file,
    check_new_bundle,
    check_new_tokens,
    check_prompts,
    check_scales_file,
    check_source,
    check_text,
)
from cllm_export.errors import CalibrationError, CheckpointError, about
from cllm_export.exporter.checkpoint.adapter_files import check_checkpoint, is_adapter, refuse_base, require_tensors
from cllm_export.exporter.checkpoint.files import is_gguf
from cllm_export.exporter.gguf.options import IMPORT_NAME
from cllm_export.exporter.options import BuildOptions, check_lengths, refuse_link
from cllm_export.prompts import read_prompts
from cllm_export.runtime.options import GenerateOptions
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.options import TuneOptions


def check_build(checkpoint: Path, output: Path, options: BuildOptions, *, force: bool) -> None:
    """Check the arguments of `build`."""
    check_new_bundle(output, force=force)
    if is_gguf(checkpoint):
        _check_build_of_gguf(checkpoint, options)
        return
    check_checkpoint_or_adapter(checkpoint, options.base)
    if not is_adapter(checkpoint):
        check_lengths(options, check_checkpoint(checkpoint), checkpoint)
    if options.quantize:
        check_scales_file(options.quantize.scales)
        if not is_adapter(checkpoint):
            require_tensors(checkpoint, options.quantize.keep)


def _check_build_of_gguf(path: Path, options: BuildOptions) -> None:
    with about("base"):
        refuse_base(path, options.base)
    refuse_link(path, options)
    file = check_gguf_file("checkpoint", path)
    config = {"max_position_embeddings": file.get("context_length"), "num_hidden_layers": file.get("block_count")}
    check_lengths(options, config, path)
    if options.quantize:
        check_scales_file(options.quantize.scales)


def check_import(file: Path, output: Path, *, force: bool) -> None:
    """Check the arguments of `import`."""
    with about("output"):
        check_output(output, force=force, marker=IMPORT_NAME)
    check_gguf_file("file", file)


def check_generate(bundle: Path, options: GenerateOptions, *, draft_model: Path | None) -> None:
    """Check what `generate` and `chat` load."""
    check_bundle("bundle", bundle, block_sizes=[options.block_size if options.block_size != "auto" else None])
    check_new_tokens(bundle, options.max_new_tokens)
    check_bundle("draft_model", draft_model)


def check_collect(source: Path, prompts: Path, output: Path, options: CollectOptions, *, device: str | None) -> None:
    """Check the arguments of `collect`."""
    from cllm_export.training.collection.collection import check_collection_output
    from cllm_export.training.collection.source import check_kind

    with about("output"):
        check_collection_output(output)
    check_kind(source, device)
    check_source("source", source, block_size=options.block_size)
    check_prompts("prompts", prompts, limit=options.limit)


def check_tune(checkpoint: Path, output: Path, options: TuneOptions, *, force: bool, resume: bool) -> None:
    """Check the arguments of `tune` that it cannot do without."""
    from cllm_export.training.arguments import check_tuning_output

    with about("output"):
        check_tuning_output(output, force=force, resume=resume)
    with about("checkpoint"):
        config = check_checkpoint(checkpoint)
    lengths = BuildOptions(max_length=options.max_length, block_size=options.block_sizes[0])
    check_lengths(lengths, config, checkpoint)


def check_tune_data(trajectories: Path | None, held_out: Path | None, num_held_out: int) -> None:
    """Check the data of `tune` that may be left out."""
    from cllm_export.training.collection.collection import read_complete

    check_prompts("held_out", held_out, limit=num_held_out)
    if trajectories is not None:
        with about("trajectories"):
            read_complete(trajectories)


def check_quantize(checkpoint: Path, against: Path, output: Path, options: FitOptions, *, force: bool) -> None:
    """Check the arguments of `quantize`."""
    check_new_bundle(output, force=force)
    bundle = check_bundle("against", against, block_sizes=[options.held_out.block_size])
    with about("checkpoint"):
        config = check_checkpoint(checkpoint)
    check_scales_file(options.scales)
    check_text(options.held_out.text)
    layers, held = config.get("num_hidden_layers"), bundle.manifest.geometry.num_layers if bundle else None
    if isinstance(layers, int) and held != layers:
        raise CalibrationError(
            f"{against} has {held} of the {layers} layers of {checkpoint}: give a bundle "
            "that was built without num_layers"
        )


def check_demo(example: Path, output: Path, *, force: bool) -> None:
    """Check the arguments of `demo`."""
    with about("example"):
        if not (example / "checkpoint").is_dir():
            raise CheckpointError(
                f"{example} has no checkpoint/; run the demo from a clone of the repository, or give --example"
            )
        check_checkpoint(example / "checkpoint")
        read_prompts(example / "prompts.jsonl")
    check_new_bundle(output, force=force)
