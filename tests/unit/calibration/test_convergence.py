"""Which bundles `convergence` compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm_export.calibration.search.convergence import require_same_model
from cllm_export.errors import CalibrationError
from tests.fakes import with_manifest, write_bundle


def test_bundles_of_one_checkpoint_are_compared(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    require_same_model(bundle, with_manifest(bundle, precision="fp16"))


def test_a_bundle_of_fewer_layers_is_refused(tmp_path: Path):
    """It has the fingerprint of the whole checkpoint."""
    bundle = write_bundle(tmp_path / "bundle")
    layers = bundle.manifest.geometry.num_layers
    fewer = with_manifest(bundle, geometry=replace(bundle.manifest.geometry, num_layers=layers + 1))
    with pytest.raises(CalibrationError, match=f"has {layers + 1} layers and .* has {layers}: compare bundles of"):
        require_same_model(bundle, fewer)


def test_a_bundle_of_another_checkpoint_is_refused(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(CalibrationError, match="are of different checkpoints"):
        require_same_model(bundle, with_manifest(bundle, checkpoint_fingerprint="1" * 64))
