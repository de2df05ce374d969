"""The memory that a device needs: exact where it can be, and each figure says how it came about."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import OptionError
from cllm_export.tensorrt.memory import MemoryOptions, memory_figures
from tests.fakes import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def figures(bundle: Bundle, options: MemoryOptions | None = None) -> dict[str, int]:
    return {figure.name: figure.bytes for figure in memory_figures(bundle, options or MemoryOptions())}


def test_the_cache_is_exact(bundle: Bundle):
    """2 x 2 layers x 2 heads x 8 x 4 bytes a token; 64 + 16 - 1 rows."""
    assert figures(bundle)["KV cache"] == 256 * 79
    assert figures(bundle, MemoryOptions(batch_size=8))["KV cache"] == 8 * 256 * 79
    assert figures(bundle, MemoryOptions(max_length=32))["KV cache"] == 256 * 47


def test_half_the_precision_is_half_the_weights_and_half_the_cache(bundle: Bundle):
    full, half = figures(bundle), figures(bundle, MemoryOptions(precision="fp16"))
    for name in ("weights", "KV cache"):
        assert 2 * half[name] == full[name]


def test_an_engine_takes_the_sum_and_a_build_twice_the_weights_on_the_host(bundle: Bundle):
    found = figures(bundle, MemoryOptions(workspace=1000))
    assert found["running engine"] == found["weights"] + found["KV cache"] + found["activations"]
    assert found["build, host"] == 2 * found["weights"]
    assert found["build, device"] == found["running engine"] + 1000


def test_activations_grow_with_slots_and_with_the_widest_forward(bundle: Bundle):
    one = figures(bundle)["activations"]
    assert figures(bundle, MemoryOptions(batch_size=4))["activations"] == 4 * one
    assert figures(bundle, MemoryOptions(prefill_chunk=256))["activations"] > one


def test_every_figure_says_how_it_is_computed(bundle: Bundle):
    found = memory_figures(bundle, MemoryOptions())
    assert all(figure.how for figure in found)
    assert "no build was measured" in found[-1].how


def test_a_block_beyond_the_bundle_is_refused(bundle: Bundle):
    with pytest.raises(OptionError, match="block_size must be at most 16"):
        memory_figures(bundle, MemoryOptions(block_size=17))
