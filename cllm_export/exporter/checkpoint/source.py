"""Checks that a bundle was built from a given checkpoint."""

from __future__ import annotations

from pathlib import Path

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import BundleError
from cllm_export.extras import needs_extra


def require_source(bundle: Bundle, checkpoint: Path, base: Path | None = None) -> None:
    """Check that a bundle was built from this checkpoint, or from this adapter and its ``base``.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        BundleError: the bundle was built from another checkpoint.
        MissingExtraError: the extra ``export`` is not installed.
    """
    with needs_extra("export"):
        from cllm_export.exporter.checkpoint.adapter import open_source

    opened, _ = open_source(checkpoint, base, max_length=bundle.manifest.max_length)
    if opened.fingerprint() != bundle.manifest.checkpoint_fingerprint:
        raise BundleError(
            f"{bundle.path} was not built from {checkpoint}: their fingerprints differ; "
            "give the checkpoint it was built from, or rebuild it"
        )
