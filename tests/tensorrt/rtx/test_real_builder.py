"""Plans of every family by the real parser and builder: they build, and what is inside is what was inside.

Nothing here runs a plan: tokens and speed need a card. ``make contacts`` builds the other precisions and variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.exporter.checkpoint.families import FAMILIES
from cllm_export.tensorrt import build_plan as build_module
from tests.checkpoints import REALISTIC
from tests.conftest import Workshop
from tests.tensorrt.rtx.plans import (
    MOST_WEIGHTS,
    REWRITE,
    contents_of,
    counts_of,
    family_of,
    graph_weight_bytes,
    read_golden,
    require_library,
)

NUM_LAYERS = 2
SPELLED_OUT = ("gemma2",)
"""Families whose attention the graph spells out, since no kernel has their softcap."""


@pytest.fixture(scope="module")
def version() -> str:
    return require_library()


def test_there_is_a_checkpoint_of_every_family():
    assert sorted(map(family_of, REALISTIC)) == sorted(FAMILIES)


@pytest.mark.parametrize("name", REALISTIC)
def test_a_plan_of_every_family_builds_and_holds_what_it_held(
    version: str, workshop: Workshop, tmp_path: Path, name: str
):
    """One attention kernel a layer, each weight once, and as many kernels and copies as when it was last looked at."""
    family, bundle = family_of(name), workshop.bundle(name, precision="fp16")
    contents = contents_of(bundle, tmp_path / name)
    for profile in contents.profiles:
        assert sum(profile.attention.values()) == (0 if family in SPELLED_OUT else NUM_LAYERS), profile
        assert all("mha" in kernel for kernel in profile.attention)
    assert contents.weight_bytes <= MOST_WEIGHTS * graph_weight_bytes(bundle)
    golden = read_golden(version)
    if golden is None:
        pytest.skip(f"the plan builds; its counts are those of {version}, which nobody has looked at: run {REWRITE}")
    assert counts_of(contents) == golden[family], f"look at what changed, then run {REWRITE}"


def test_an_attention_that_has_a_kernel_keeps_it_though_it_may_be_decomposed(
    version: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = workshop.bundle("real-llama", precision="fp16")
    allowed = contents_of(bundle, tmp_path / "allowed")
    monkeypatch.setattr(build_module, "allow_decomposing", _leave_as_it_is)
    assert contents_of(bundle, tmp_path / "as parsed") == allowed


def _leave_as_it_is(network: Any, tensorrt: Any) -> int:
    return 0
