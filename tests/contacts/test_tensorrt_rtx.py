"""TensorRT for RTX parses and builds every family in every precision, for named cards.

The library needs no GPU for it, so nothing here runs a plan. Without the library every test here fails: `make setup`
installs it on Linux on x86_64. ``tests/tensorrt/rtx`` holds the short form, and the golden of what is in a plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.tensorrt.library import TENSORRT_RTX, import_library
from tests.checkpoints import REALISTIC
from tests.conftest import Workshop
from tests.tensorrt.rtx.plans import (
    ALL_SIZES,
    CARDS,
    NUM_LAYERS,
    SPELLED_OUT,
    contents_of,
    family_of,
    require_sound,
)


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    """The library. If it is missing, that is an error and no reason to skip."""
    return import_library(TENSORRT_RTX)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", REALISTIC)
def test_every_family_builds_in_every_precision(workshop: Workshop, tmp_path: Path, name: str, precision: str):
    """fp32 has no kernel for attention, and a softcap has none in any precision: both are spelled out."""
    bundle = workshop.bundle(name, precision=precision)
    contents = contents_of(bundle, tmp_path / name, *CARDS, block_sizes=ALL_SIZES)
    is_fused = precision != "fp32" and family_of(name) not in SPELLED_OUT
    require_sound(contents, bundle, attention=NUM_LAYERS if is_fused else 0)
