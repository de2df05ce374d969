"""The memory that a device needs: exact where it can be, and each figure says how it came about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm_export.bundle.contract import FixedShapes, Geometry, Precision
from cllm_export.bundle.inspect import describe
from cllm_export.bundle.linked_weights import LinkedFile, LinkedWeight
from cllm_export.bundle.manifest import GREEDY_GRAPH, LOOKAHEAD_GRAPH, WEIGHTS_NAME, Bundle
from cllm_export.bundle.quantization import Quantization
from cllm_export.errors import OptionError
from cllm_export.tensorrt.memory import MemoryOptions, judge_memory, memory_figures
from tests.fakes import with_manifest, write_bundle


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


def test_an_engine_takes_the_sum_and_a_build_three_times_the_weights_on_the_host(bundle: Bundle):
    found = figures(bundle, MemoryOptions(workspace=1000))
    assert found["running engine"] == found["weights"] + found["KV cache"] + found["activations"]
    assert found["build, host"] == 300_000_000 + round(3.1 * found["weights"])
    assert found["build, device"] == found["running engine"] + 1000


def llama(path: Path, weight_bytes: int, geometry: Geometry, precision: Precision = "bf16") -> Bundle:
    """A bundle of these numbers alone."""
    bundle = write_bundle(path, geometry=geometry, precision=precision)
    files = bundle.manifest.files
    return with_manifest(
        bundle, files={**files, WEIGHTS_NAME: replace(files[WEIGHTS_NAME], size=weight_bytes)}, precision=precision
    )


def linked(bundle: Bundle) -> Bundle:
    """The same weights, one of which lies in the checkpoint."""
    size, files = 2 * bundle.manifest.geometry.hidden_size, bundle.manifest.files
    weight = LinkedWeight(file="a.safetensors", offset=8, length=size, dtype="BF16", shape=(size // 2,))
    return with_manifest(
        bundle,
        files={**files, WEIGHTS_NAME: replace(files[WEIGHTS_NAME], size=bundle.weight_bytes - size)},
        linked_files={"a.safetensors": LinkedFile(path="/a.safetensors", size=size + 8, sha256="0" * 64)},
        linked_weights={"norm": weight},
    )


LLAMA_1B = {"num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "head_dim": 64, "hidden_size": 2048}


def test_what_builds_of_a_billion_weights_took_is_predicted(tmp_path: Path):
    """`benchmarks/plan_size.py` measured the numbers on the right: weights on the device, and the host's peak."""
    geometry = Geometry(**LLAMA_1B, vocab_size=32000, cache_length=2111, max_block_size=64)
    bundle = linked(llama(tmp_path / "bundle", 2_200_383_992, geometry))
    plain, doubled = figures(bundle), figures(bundle, MemoryOptions(single_row_kernels=True))
    assert plain["build, host"] == pytest.approx(7_095_008_000, rel=0.05)
    assert doubled["build, host"] == pytest.approx(9_593_092_000, rel=0.05)
    assert plain["weights"] == pytest.approx(2_200_204_288, rel=0.01)
    assert doubled["weights"] + doubled["second copy"] == pytest.approx(3_445_912_576, rel=0.05)
    assert doubled["running engine"] == plain["running engine"] + doubled["second copy"]


def test_of_copied_weights_all_linear_ones_of_the_layers_are_copied_again(tmp_path: Path):
    """The real builder's weights of three layers of the same width, less those of the plan without such kernels."""
    geometry = Geometry(**{**LLAMA_1B, "num_layers": 3}, vocab_size=2048, cache_length=575, max_block_size=64)
    bundle = llama(tmp_path / "bundle", 281_101_184, geometry)
    for each, measured in ((bundle, 545_342_336 - 281_101_184), (linked(bundle), 450_970_496 - 281_101_184)):
        found = figures(each, MemoryOptions(single_row_kernels=True))
        assert found["second copy"] == pytest.approx(measured, rel=0.05)


def test_int4_weights_have_no_second_copy(bundle: Bundle):
    assert figures(bundle, MemoryOptions(single_row_kernels=True))["second copy"] > 0
    record = Quantization(
        scheme="int4", method="round to nearest", group_size=32, engines=("tensorrt",), weights=("weight",), kept={}
    )
    quantised = with_manifest(bundle, quantization=record)
    assert figures(quantised, MemoryOptions(single_row_kernels=True))["second copy"] == 0


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 65}, "max_length must be at most the bundle's 64, got 65: build the bundle with a larger"),
        ({"max_length": 3}, "block_size must be at most max_length, got a block of 4 and 3 tokens"),
        ({"max_length": 8, "block_size": 9}, "block_size must be at most max_length, got a block of 9 and 8 tokens"),
    ],
)
def test_a_size_that_the_bundle_cannot_have_is_refused(bundle: Bundle, options: dict[str, int], said: str):
    for ask in (memory_figures, judge_memory):
        with pytest.raises(OptionError, match=said):
            ask(bundle, MemoryOptions(**options))


@pytest.mark.parametrize("name", ["batch_size", "block_size", "max_length", "prefill_chunk", "device_memory"])
def test_nothing_is_planned_for_none_of_anything(name: str):
    with pytest.raises(OptionError, match=f"{name} must be an integer of at least 1, got 0"):
        MemoryOptions(**{name: 0})


def test_a_bundle_with_fixed_shapes_is_planned_as_it_is(tmp_path: Path):
    pinned = write_bundle(tmp_path / "pinned", fixed_shapes=FixedShapes(batch_size=2, block_size=8, kv_length=79))
    for name, value in (("batch_size", 3), ("block_size", 4), ("max_length", 32)):
        with pytest.raises(OptionError, match=f"pinned to {name} "):
            judge_memory(pinned, MemoryOptions(**{name: value}))


def test_a_device_fits_from_the_byte_on_that_the_engine_needs(bundle: Bundle):
    needed = figures(bundle)["running engine"]
    fits = judge_memory(bundle, MemoryOptions(device_memory=needed))
    assert (fits.fits, fits.needed, fits.device_memory) == (True, needed, needed)
    short = judge_memory(bundle, MemoryOptions(device_memory=needed - 1))
    assert not short.fits
    assert f"needs {needed:,} bytes, and the given device has {needed - 1:,}; not even one slot" in short.why


def test_a_verdict_says_how_many_slots_would_fit(bundle: Bundle):
    four = figures(bundle, MemoryOptions(batch_size=4))["running engine"]
    short = judge_memory(bundle, MemoryOptions(batch_size=100, device_memory=four))
    assert "; 4 slots would fit: " in short.why
    assert judge_memory(bundle, MemoryOptions(batch_size=4, device_memory=four)).fits
    assert not judge_memory(bundle, MemoryOptions(batch_size=5, device_memory=four)).fits


def test_this_machine_is_judged_where_no_device_is_given(bundle: Bundle):
    assert "this machine" in judge_memory(bundle, MemoryOptions()).why


def test_a_bundles_memory_names_each_part_of_its_total(bundle: Bundle):
    """The prefix cache is in it, and what a forward needs besides weights and cache."""
    memory, found = describe(bundle)["memory"], figures(bundle)
    assert memory["activations"] == found["activations"] > 0
    assert memory["prefix_cache"] == found["prefix cache"] == 256 << 20
    assert memory["total"] == found["running engine"] + found["prefix cache"]


def test_a_quantised_bundle_is_planned_in_its_own_precision(bundle: Bundle):
    """Its weights would not shrink with the dtype of the computation."""
    record = Quantization(
        scheme="int4", method="round to nearest", group_size=32, engines=("tensorrt",), weights=("weight",), kept={}
    )
    quantised = with_manifest(bundle, quantization=record)
    with pytest.raises(OptionError, match="precision is for bundles that are not quantised, and this one has int4"):
        memory_figures(quantised, MemoryOptions(precision="fp16"))
    assert memory_figures(quantised, MemoryOptions(precision="fp32"))


def test_a_lookahead_graph_packs_the_weights_a_second_time(bundle: Bundle):
    """Its session is another one, so the part has a name of its own and is in the total."""
    graphs = bundle.manifest.graphs
    memory = describe(with_manifest(bundle, graphs={**graphs, LOOKAHEAD_GRAPH: graphs[GREEDY_GRAPH]}))["memory"]
    plain = describe(bundle)["memory"]
    assert memory["weights_packed_again_for_lookahead"] == plain["weights"]
    assert memory["total"] == plain["total"] + plain["weights"]
    assert "weights_packed_again_for_lookahead" not in plain
