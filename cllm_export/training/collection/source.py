"""Opens the source of trajectories: a bundle runs in its exported engine, a checkpoint in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cllm_export.bundle.manifest import GREEDY_GRAPH, MANIFEST_NAME, TOKENIZER_NAME, open_bundle
from cllm_export.checks import require_at_least
from cllm_export.errors import CheckpointError, OptionError
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.machine import require_threads
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from cllm_export.training.collection.collection import EngineName

DEFAULT_BATCH_SIZE = 8
"""Default number of slots. On one core of the machine that the published figures come from, PyTorch is fastest at 8.
ONNX Runtime is equally fast from 4 to 16."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model whose engine has several slots, and what identifies it."""

    model: Model
    engine: EngineName
    device: str
    model_fingerprint: str
    bundle_fingerprint: str | None
    tokenizer_sha256: str

    @property
    def batch_size(self) -> int:
        return self.model.engine.num_slots


def open_source(
    path: Path, *, batch_size: int | None = None, threads: int | None = None, device: str | None = None
) -> Source:
    """Open a bundle or a checkpoint for decoding in ``batch_size`` slots.

    Raises:
        CheckpointError: the path is neither a bundle nor a checkpoint, or the checkpoint cannot be exported.
        BundleError: the bundle is damaged.
        OptionError: an option is out of range, or does not apply.
    """
    if batch_size is not None:
        require_at_least("batch_size", batch_size, 1)
    require_threads(threads)
    check_kind(path, device)
    if (path / MANIFEST_NAME).exists():
        return _open_bundle(path, batch_size, threads)
    return _open_checkpoint(path, batch_size, threads, device or "cpu")


def check_kind(path: Path, device: str | None) -> None:
    """Check that a path is a bundle or a checkpoint, and runs on this device.

    Raises:
        CheckpointError: it is neither.
        OptionError: a bundle is asked to run on another device than the CPU.
    """
    if (path / MANIFEST_NAME).exists():
        if device not in (None, "cpu"):
            raise OptionError(f"device='{device}' is for checkpoints: a bundle runs on the CPU")
    elif not (path / "config.json").exists():
        what = "it has neither bundle.json nor config.json" if path.is_dir() else "there is no such directory"
        raise CheckpointError(f"{path} is neither a checkpoint nor a bundle: {what}")


def _open_bundle(path: Path, batch_size: int | None, threads: int | None) -> Source:
    bundle = open_bundle(path)
    pinned = bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes
    num_slots = batch_size or (None if pinned else DEFAULT_BATCH_SIZE)
    codec = TextCodec.of_bundle(bundle)
    return Source(
        model=Model(bundle.manifest, OrtEngine(bundle, num_slots=num_slots, threads=threads), codec),
        engine="onnxruntime",
        device="cpu",
        model_fingerprint=bundle.manifest.checkpoint_fingerprint,
        bundle_fingerprint=bundle.fingerprint,
        tokenizer_sha256=bundle.manifest.files[TOKENIZER_NAME].sha256,
    )


def _open_checkpoint(path: Path, batch_size: int | None, threads: int | None, device: str) -> Source:
    import torch

    from cllm_export.exporter.checkpoint.read import open_checkpoint
    from cllm_export.training.model.torch_engine import load_weights, model_around

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(path)
    weights = load_weights(checkpoint, device=device)
    return Source(
        model=model_around(weights, checkpoint, num_slots=batch_size or DEFAULT_BATCH_SIZE),
        engine="torch",
        device=device,
        model_fingerprint=checkpoint.fingerprint(),
        bundle_fingerprint=None,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
