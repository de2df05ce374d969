"""What can be refused of one argument or option."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.manifest import MANIFEST_NAME, Bundle, open_bundle
from cllm_export.bundle.scales import check_scales
from cllm_export.bundle.storage import check_file, check_output, check_parent
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError, OutputError, about
from cllm_export.evaluation.sources import kind_of
from cllm_export.exporter.checkpoint.adapter_files import (
    check_adapter,
    check_base,
    check_checkpoint,
    is_adapter,
)
from cllm_export.exporter.gguf.architectures import check_gguf
from cllm_export.exporter.gguf.header import GgufFile, read_gguf
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.prefix.prefix_snapshot import check_snapshot
from cllm_export.runtime.general_text import general_passages
from cllm_export.runtime.load import Provider, require_plan


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


def check_plan(bundle: Path, provider: Provider, plan: str | None) -> None:
    """Check the plan that an option names."""
    require_plan(open_bundle(bundle), provider, plan)


def check_new_tokens(bundle: Path, max_new_tokens: int | None) -> None:
    """Refuse more new tokens than a bundle holds, whatever the prompt is."""
    length = open_bundle(bundle).manifest.max_length
    if max_new_tokens is not None and max_new_tokens >= length:
        raise OptionError(
            f"max_new_tokens must be below {length}, which {bundle} holds with the prompt, got {max_new_tokens}"
        )


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


def check_gguf_file(name: str, path: Path) -> GgufFile:
    """Check a GGUF file that an argument names, and return its header."""
    with about(name):
        file = read_gguf(path)
        check_gguf(file)
    return file


def check_prompts(name: str, path: Path | None, *, limit: int | None = None) -> None:
    """Check every row of a prompt file that an option names."""
    if path is not None:
        with about(name):
            read_prompts(path, limit=limit)


def check_text(path: Path | None) -> None:
    """Check the general text that an option names."""
    with about("text"):
        general_passages(path)


def check_new_bundle(output: Path, *, force: bool) -> None:
    """Check the directory that a bundle will be written to."""
    with about("output"):
        check_output(output, force=force, marker=MANIFEST_NAME)


def check_report(name: str, path: Path | None, *, force: bool) -> None:
    """Check the file that a report will be written to."""
    if path is not None:
        with about(name):
            check_file(path, force=force, name=name)


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
