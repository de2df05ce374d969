"""Every family through the whole path: built, verified against PyTorch by the product's own checks, and generating."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm_export.exporter.checkpoint.families import FAMILIES
from cllm_export.runtime.load import load
from cllm_export.verification.report import VerifyOptions
from cllm_export.verification.verify import verify
from tests.checkpoints import VARIANTS
from tests.conftest import THREADS, Workshop

FIRST_OF_FAMILY = {variant.family: name for name, variant in reversed(VARIANTS.items())}


def test_every_supported_family_has_a_checkpoint_that_the_parity_tests_export():
    assert set(FIRST_OF_FAMILY) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_each_family_is_built_verified_and_generates(workshop: Workshop, tmp_path: Path, family: str):
    """``verify`` requires losslessness bit for bit, and PyTorch's tokens but for margins under its own epsilon."""
    name = FIRST_OF_FAMILY[family]
    bundle = workshop.copy(workshop.bundle(name), tmp_path / "bundle")
    parity = verify(
        bundle,
        checkpoint=workshop.checkpoint(name),
        options=VerifyOptions(threads=THREADS, max_new_tokens=16),
    )
    failed = [f"{check.name}: {check.detail}" for check in parity.checks if not check.passed]
    assert parity.passed, failed
    assert bundle.manifest.family == family
    assert load(bundle.path, threads=THREADS).generate("the cat", max_new_tokens=8, ignore_eos=True).text
