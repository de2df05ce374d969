"""Opens the model to evaluate: a bundle in the runtime, a checkpoint in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cllm_export.bundle.manifest import MANIFEST_NAME
from cllm_export.errors import BundleError, CheckpointError
from cllm_export.exporter.checkpoint.files import import_advice
from cllm_export.extras import needs_extra
from cllm_export.runtime.engines.machine import available_threads, require_threads
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model

SourceKind = Literal["bundle", "checkpoint"]
CONFIG_NAME = "config.json"


def kind_of(path: Path) -> SourceKind:
    """Whether a directory is a bundle or a checkpoint.

    Raises:
        BundleError: it is neither.
        CheckpointError: it is a GGUF file.
    """
    if (path / MANIFEST_NAME).is_file():
        return "bundle"
    if (path / CONFIG_NAME).is_file():
        return "checkpoint"
    if advice := import_advice(path):
        raise CheckpointError(advice)
    raise BundleError(
        f"{path} is neither a bundle (it has no {MANIFEST_NAME}) nor a checkpoint (no {CONFIG_NAME}): give a directory "
        "that `cllm-export build` wrote, or a Hugging Face directory"
    )


def open_source(path: Path, *, threads: int | None = None) -> Model:
    """Load a bundle in the runtime, or a checkpoint unchanged in PyTorch.

    Raises:
        BundleError, CheckpointError: the path is neither, or its content is damaged or unsupported.
        MissingExtraError: the path is a checkpoint, and the extra ``train`` is not installed.
    """
    if kind_of(path) == "bundle":
        return load(path, threads=threads, prefix_cache_bytes=0)
    require_threads(threads)
    with needs_extra("train"):
        import torch

        from cllm_export.training.model.torch_engine import load_checkpoint
    torch.set_num_threads(threads or available_threads())
    return load_checkpoint(path)
