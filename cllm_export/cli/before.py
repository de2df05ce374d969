"""What each command can refuse before it imports an engine or torch: files, rows, numbers that a manifest bounds.

The same checks run again where the files are read. Here they name the option, and cost no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.manifest import MANIFEST_NAME, Bundle, open_bundle
from cllm_export.bundle.scales import check_scales
from cllm_export.bundle.storage import check_output, check_parent, check_report_path
from cllm_export.calibration.search.budget import FitOptions
from cllm_export.checks import require_at_least
from cllm_export.errors import CalibrationError, CheckpointError, OutputError, about
from cllm_export.evaluation.sources import kind_of
from cllm_export.exporter.checkpoint.adapter_files import (
    check_adapter,
    check_base,
    check_checkpoint,
    is_adapter,
    require_tensors,
)
from cllm_export.exporter.options import BuildOptions, check_lengths
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_snapshot


def check_counts(**counts: int | None) -> None:
    """Refuse a count below 1. None stands for the default."""
    for name, count in counts.items():
        if count is not None:
            require_at_least(name, count, 1)


def check_bundle(name: str, path: Path | None, *, block_sizes: Sequence[int | None] = ()) -> Bundle | None:
    """Open a bundle that an option or an argument names, and check block sizes against it."""
    if path is None:
        return None
    with about(name):
        bundle = open_bundle(path)
    for size in block_sizes:
        if size is not None:
            check_block_size(size, largest=bundle.manifest.geometry.max_block_size)
    return bundle


def check_source(name: str, path: Path | None, *, block_size: int | None = None) -> None:
    """Check what an option or an argument names: a bundle, or a checkpoint."""
    if path is None:
        return
    with about(name):
        if kind_of(path) == "checkpoint":
            check_checkpoint(path)
            return
    check_bundle(name, path, block_sizes=[block_size])


def check_checkpoint_or_adapter(checkpoint: Path | None, base: Path | None = None) -> None:
    """Check the files of a checkpoint, or of an adapter and its base."""
    if checkpoint is None:
        return
    with about("checkpoint"):
        if is_adapter(checkpoint):
            check_adapter(checkpoint)
        else:
            check_checkpoint(checkpoint)
    with about("base"):
        check_base(checkpoint, base)


def check_prompts(name: str, path: Path | None, *, limit: int | None = None) -> None:
    """Check every row of a prompt file that an option names."""
    if path is not None:
        with about(name):
            read_prompts(path, limit=limit)


def check_new_bundle(output: Path, *, force: bool) -> None:
    """Check the directory that a bundle will be written to."""
    with about("output"):
        check_output(output, force=force, marker=MANIFEST_NAME)


def check_report(name: str, path: Path | None) -> None:
    """Check the file that a report will be written to."""
    if path is not None:
        with about(name):
            check_report_path(path)


def check_prefix(path: Path | None) -> None:
    """Check the snapshot that `generate` will load."""
    if path is not None:
        with about("load_prefix"):
            check_snapshot(path)


def check_scales_file(path: Path | None) -> None:
    """Check the scales that a quantised bundle will be made with."""
    if path is not None:
        with about("scales"):
            check_scales(path)


def check_build(checkpoint: Path, output: Path, options: BuildOptions, *, force: bool) -> None:
    """Check the arguments of `build`."""
    check_new_bundle(output, force=force)
    check_checkpoint_or_adapter(checkpoint, options.base)
    if not is_adapter(checkpoint):
        check_lengths(options, check_checkpoint(checkpoint), checkpoint)
    if options.quantize:
        check_scales_file(options.quantize.scales)
        if not is_adapter(checkpoint):
            require_tensors(checkpoint, options.quantize.keep)


def check_collect(source: Path, prompts: Path, output: Path, *, block_size: int | None, limit: int | None) -> None:
    """Check the arguments of `collect`."""
    from cllm_export.training.collection.collection import check_collection_output

    with about("output"):
        check_collection_output(output)
    check_source("source", source, block_size=block_size)
    check_prompts("prompts", prompts, limit=limit)


def check_tune(checkpoint: Path, prompts: Path, output: Path, *, limit: int | None, force: bool, resume: bool) -> None:
    """Check the arguments of `tune` that it cannot do without."""
    from cllm_export.training.arguments import check_tuning_output

    with about("output"):
        check_tuning_output(output, force=force, resume=resume)
    with about("checkpoint"):
        check_checkpoint(checkpoint)
    check_prompts("prompts", prompts, limit=limit)


def check_tune_data(trajectories: Path | None, held_out: Path | None, num_held_out: int) -> None:
    """Check the other data of `tune`."""
    from cllm_export.training.collection.collection import read_complete

    check_prompts("held_out", held_out, limit=num_held_out)
    if trajectories is not None:
        with about("trajectories"):
            read_complete(trajectories)


def check_scales_output(output: Path, *, force: bool) -> None:
    """Check the scales file that `calibrate` will write. Directories above it are made."""
    with about("output"):
        check_parent(output)
        if output.is_dir():
            raise OutputError(f"{output} is a directory: choose another output", fields=("output",))
        if output.exists() and not force:
            raise OutputError(
                f"{output} exists; replace it with force=True or choose another output", fields=("output",)
            )


def check_quantize(
    checkpoint: Path, against: Path, output: Path, options: FitOptions, *, force: bool, block_size: int | None
) -> None:
    """Check the arguments of `quantize`."""
    check_new_bundle(output, force=force)
    bundle = check_bundle("against", against, block_sizes=[block_size])
    with about("checkpoint"):
        config = check_checkpoint(checkpoint)
    check_scales_file(options.scales)
    layers, held = config.get("num_hidden_layers"), bundle.manifest.geometry.num_layers if bundle else None
    if isinstance(layers, int) and held != layers:
        raise CalibrationError(
            f"{against} has {held} of the {layers} layers of {checkpoint}: give a bundle "
            "that was built without num_layers"
        )


def check_demo(example: Path, output: Path) -> None:
    """Check the arguments of `demo`."""
    with about("example"):
        if not (example / "checkpoint").is_dir():
            raise CheckpointError(
                f"{example} has no checkpoint/; run the demo from a clone of the repository, or give --example"
            )
        check_checkpoint(example / "checkpoint")
        read_prompts(example / "prompts.jsonl")
    check_new_bundle(output, force=True)
