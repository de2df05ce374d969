"""Plans of every family by the real parser and builder: they build, and what is inside is what was inside.

Nothing here runs a plan: tokens and speed need a card. ``make contacts`` builds the other precisions and variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.contract import BYTES, KV_DTYPE
from cllm_export.bundle.manifest import GREEDY_GRAPH
from cllm_export.exporter.checkpoint.families import FAMILIES
from cllm_export.tensorrt import build_plan as build_module
from cllm_export.tensorrt.memory import MemoryOptions, memory_figures
from tests.checkpoints import REALISTIC
from tests.conftest import PINNED, Workshop
from tests.tensorrt.rtx.plans import (
    NUM_LAYERS,
    PROFILES,
    REWRITE,
    SPELLED_OUT,
    contents_of,
    counts_of,
    family_of,
    read_golden,
    require_library,
    require_sound,
)


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
    attention = 0 if family in SPELLED_OUT else NUM_LAYERS
    require_sound(contents, bundle, attention=attention, num_profiles=len(PROFILES))
    golden = read_golden(version)
    if golden is None:
        pytest.skip(f"the plan builds; its counts are those of {version}, which nobody has looked at: run {REWRITE}")
    assert counts_of(contents) == golden[family], f"look at what changed, then run {REWRITE}"


@pytest.mark.parametrize(
    ("built", "whole_cache"),
    [
        ({}, False),
        ({}, True),
        ({"batch_size": 2}, False),
        (PINNED, True),
        ({**PINNED, "batch_size": 2}, True),
    ],
    ids=["extents", "whole cache", "two slots", "fixed shapes", "fixed shapes, two slots"],
)
def test_a_layer_copies_its_rows_in_one_kernel_and_each_row_once(
    version: str, workshop: Workshop, tmp_path: Path, built: dict[str, Any], whole_cache: bool
):
    """Read once and written once: a copy for each query head would be four times the bytes that are written."""
    bundle = workshop.bundle("real-llama", precision="fp16", **built)
    geometry = bundle.manifest.geometry
    asked: dict[str, Any] = {"kv_lengths": (geometry.cache_length,)} if whole_cache else {}
    if bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes:
        asked = {"block_sizes": ()}
    contents = contents_of(bundle, tmp_path / "plan", **asked)
    cache = bundle.manifest.batch_size * geometry.cache_length * geometry.kv_bytes_per_token("fp16")
    for profile in contents.profiles:
        assert (profile.cache_copies, profile.cache_copy_bytes) == (NUM_LAYERS, 2 * cache)


@pytest.mark.parametrize(
    ("name", "built"),
    [("real-llama", {"precision": "fp16"}), ("real-gemma", {"precision": "fp16"}), ("real-llama", {"weights": "link"})],
    ids=["copied", "one key/value head", "linked"],
)
def test_the_memory_that_kernels_for_one_row_add_is_predicted(
    version: str, workshop: Workshop, tmp_path: Path, name: str, built: dict[str, Any]
):
    """A copy of all linear weights of the layers; of linked ones those of q, k, v, gate and up.

    The manifest does not say how many weights are a head of its own or tables of positions. They count as layers.
    """
    bundle = workshop.bundle(name, **built)
    predicted = {each.name: each.bytes for each in memory_figures(bundle, MemoryOptions(single_row_kernels=True))}
    plain, bought = (
        contents_of(bundle, tmp_path / str(single), single_row_kernels=single).weight_bytes for single in (False, True)
    )
    geometry, size = bundle.manifest.geometry, BYTES[KV_DTYPE[bundle.manifest.precision]]
    tables = (geometry.vocab_size * geometry.hidden_size + geometry.cache_length * geometry.head_dim) * size
    assert bought - plain <= predicted["second copy"] <= 1.02 * (bought - plain + tables)


def test_an_attention_that_has_a_kernel_keeps_it_though_it_may_be_decomposed(
    version: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = workshop.bundle("real-llama", precision="fp16")
    allowed = contents_of(bundle, tmp_path / "allowed")
    monkeypatch.setattr(build_module, "allow_decomposing", _leave_as_it_is)
    assert contents_of(bundle, tmp_path / "as parsed") == allowed


def _leave_as_it_is(network: Any, tensorrt: Any) -> int:
    return 0
