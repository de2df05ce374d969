"""The check of a bundle's files: a flipped bit must be detected."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cllm_export.bundle.manifest import MANIFEST_NAME, Bundle
from cllm_export.errors import ChecksumError, OutputError
from cllm_export.verification.report import Check

CORRUPTION_LIMIT = 1 << 30
"""Larger files, in bytes, are not copied and corrupted. Their checksums are still compared."""


def check_corruption_is_caught(bundle: Bundle) -> Check:
    """Flip one byte of a copy of each file. The checksum of exactly that file must fail."""
    missed, skipped = [], []
    for name, entry in bundle.manifest.files.items():
        if entry.size > CORRUPTION_LIMIT or not entry.size:
            skipped.append(name)
            continue
        try:
            named = _corruption_is_named(bundle, name)
        except OSError as error:
            raise OutputError(f"cannot copy {name} to corrupt it: {error.strerror} ({error.filename})") from None
        if not named:
            missed.append(name)
    detail = f"one flipped byte in each of {len(bundle.manifest.files) - len(skipped)} files was named"
    if skipped:
        detail += f"; not tried on {', '.join(skipped)} (size)"
    return Check(
        name="corruption is caught by checksum",
        passed=not missed,
        detail=detail if not missed else f"a flipped byte in {missed[0]} went unnoticed",
    )


def _corruption_is_named(bundle: Bundle, name: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="cllm-export-verify-") as scratch:
        copy = Path(scratch)
        for other in (MANIFEST_NAME, *bundle.manifest.files):
            place: Callable[..., object] = shutil.copyfile if other == name else os.symlink
            place(bundle.path.resolve() / other, copy / other)
        with (copy / name).open("r+b") as file:
            file.seek(bundle.manifest.files[name].size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        try:
            own = replace(bundle.manifest, linked_files={}, linked_weights={})  # linked files belong to the checkpoint
            Bundle(path=copy, manifest=own, fingerprint=bundle.fingerprint).check_files()
        except ChecksumError as error:
            return name in str(error)
        return False
