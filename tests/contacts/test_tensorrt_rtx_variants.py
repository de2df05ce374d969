"""TensorRT for RTX parses and builds what a bundle can be besides: quantised, of fixed shapes, linked, with lookahead.

As in ``test_tensorrt_rtx.py`` nothing runs a plan, and without the library every test fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.contract import lookahead_inputs
from cllm_export.bundle.manifest import LOOKAHEAD_GRAPH, Bundle
from cllm_export.errors import GpuError, PlanError
from cllm_export.exporter.quantize.options import QuantizeOptions
from cllm_export.tensorrt.build_plan import allow_decomposing
from cllm_export.tensorrt.library import TENSORRT_RTX, Library, Log, import_library
from cllm_export.tensorrt.plan_contents import read_contents
from tests.conftest import PINNED, Workshop
from tests.scales import observe_stock, save_scales
from tests.tensorrt.rtx.plans import (
    ALL_SIZES,
    CARDS,
    MOST_WEIGHTS,
    NUM_LAYERS,
    contents_of,
    graph_weight_bytes,
    require_sound,
)

OTHER_CARDS = ("sm75", "sm80", "sm86", "sm121")
QUANTIZED = ("real-llama", "real-qwen3", "real-gemma3")
SCHEMES = ("int8", "fp8", "int4")
ROWS = 75
LOOKAHEAD_LENGTHS: list[dict[Any, int]] = [{"B": 1, "n": ROWS, "h": ROWS, "S": rows} for rows in (256, 512, 2048)]


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    """The library. If it is missing, that is an error and no reason to skip."""
    return import_library(TENSORRT_RTX)


@pytest.fixture(scope="module")
def scales(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A scales file of each checkpoint that is quantised."""
    directory = tmp_path_factory.mktemp("scales")
    made = {}
    for name in QUANTIZED:
        bundle = workshop.bundle(name, precision="fp32")
        rows = observe_stock(workshop.stock(name), bundle.manifest.geometry.vocab_size)
        made[name] = save_scales(directory / f"{name}.safetensors", bundle, rows)
    return made


def quantized(workshop: Workshop, scales: dict[str, Path], name: str, scheme: Any) -> Bundle:
    made_with: dict[str, Any] = (
        {"engine": "tensorrt", "group_size": 32} if scheme == "int4" else {"scales": scales[name]}
    )
    return workshop.bundle(name, precision="fp16", quantize=QuantizeOptions(scheme=scheme, **made_with))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_bundles_build(workshop: Workshop, scales: dict[str, Path], tmp_path: Path, name: str, scheme: str):
    """Weights stay in their few bits on the device."""
    bundle = quantized(workshop, scales, name, scheme)
    contents = contents_of(bundle, tmp_path / name, *CARDS, block_sizes=ALL_SIZES)
    require_sound(contents, bundle)
    assert graph_weight_bytes(bundle) < 0.8 * graph_weight_bytes(workshop.bundle(name, precision="fp16"))


@pytest.mark.parametrize(
    ("number_format", "target"), [("bf16", "sm75"), ("int4", "sm75"), ("fp8", "sm75"), ("fp8", "sm80"), ("fp8", "sm86")]
)
def test_a_number_format_that_a_card_lacks_is_refused_by_name_and_the_builder_agrees(
    workshop: Workshop,
    scales: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number_format: str,
    target: str,
):
    name = "real-llama"
    is_scheme = number_format != "bf16"
    bundle = quantized(workshop, scales, name, number_format) if is_scheme else workshop.bundle(name, precision="bf16")
    with pytest.raises(GpuError, match=f"{number_format}, which {target} does not have"):
        contents_of(bundle, tmp_path / "refused", target)
    monkeypatch.setattr(Library, "require_formats", lambda *_: None)
    with pytest.raises(PlanError, match="the model contains HW-specific datatypes"):
        contents_of(bundle, tmp_path / "asked", target)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_bundle_with_fixed_shapes_builds(workshop: Workshop, tmp_path: Path, batch_size: int):
    pinned = {**PINNED, "batch_size": batch_size, "precision": "fp16"}
    bundle = workshop.bundle("real-llama", **pinned)
    contents = contents_of(bundle, tmp_path / "plan", *CARDS, block_sizes=())
    require_sound(contents, bundle, num_profiles=1)


@pytest.mark.parametrize("name", ["real-llama", "real-mistral", "real-gemma3"])
def test_eight_slots_build(workshop: Workshop, tmp_path: Path, name: str):
    bundle = workshop.bundle(name, precision="fp16")
    contents = contents_of(bundle, tmp_path / name, *CARDS, block_sizes=ALL_SIZES, batch_size=8)
    require_sound(contents, bundle)


def test_linked_weights_are_handed_to_the_parser(workshop: Workshop, tmp_path: Path):
    bundle = workshop.bundle("llama-llama3-bf16-sharded", precision="bf16", weights="link")
    copied = workshop.bundle("llama-llama3-bf16-sharded", precision="bf16")
    assert bundle.manifest.linked_weights
    linked = contents_of(bundle, tmp_path / "linked", *CARDS, block_sizes=ALL_SIZES)
    assert linked.weight_bytes == contents_of(copied, tmp_path / "copied", *CARDS, block_sizes=ALL_SIZES).weight_bytes


@pytest.mark.parametrize("target", OTHER_CARDS)
@pytest.mark.parametrize("name", ["real-llama", "real-gemma"])
def test_other_generations_of_cards_are_built_for(workshop: Workshop, tmp_path: Path, name: str, target: str):
    bundle = workshop.bundle(name, precision="fp16")
    contents = contents_of(bundle, tmp_path / target, target)
    require_sound(contents, bundle, num_profiles=3)


def test_kernels_for_one_row_cost_a_second_copy_of_the_linear_weights(workshop: Workshop, tmp_path: Path):
    """Not every linear layer is copied: here the head is not. The default has no copy, and no kernel for one row."""
    bundle = workshop.bundle("real-llama", precision="fp16")
    default = contents_of(bundle, tmp_path / "default")
    bought = contents_of(bundle, tmp_path / "bought", single_row_kernels=True)
    assert [list(profile.attention) for profile in default.profiles] == [["gemm_mha_v2"]] * 3
    assert [list(profile.attention) for profile in bought.profiles] == [
        ["gemm_mha_v2"],
        ["gemv_mha_v1"],
        ["gemm_mha_v2"],
    ]
    embedding = 2 * bundle.manifest.geometry.vocab_size * 512
    linear = graph_weight_bytes(bundle) - embedding
    assert default.weight_bytes <= MOST_WEIGHTS * graph_weight_bytes(bundle)
    assert linear / 2 < bought.weight_bytes - default.weight_bytes <= linear


def test_the_lookahead_graph_parses_and_builds(library: Any, workshop: Workshop):
    """No command makes a plan of it: this shows that one could."""
    bundle = workshop.bundle("real-llama", precision="fp16", lookahead=True)
    log = Log(library)
    builder = library.Builder(log.logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log.logger)
    assert parser.parse_from_file(str(bundle.graph_path(LOOKAHEAD_GRAPH))), log.explain("")
    assert not any(network.get_input(index).is_shape_tensor for index in range(network.num_inputs))
    assert allow_decomposing(network, library) == NUM_LAYERS
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.SM89, 0)
    for spec in lookahead_inputs(bundle.manifest.geometry, bundle.manifest.precision):
        shapes = ([length.get(axis, axis) for axis in spec.shape] for length in LOOKAHEAD_LENGTHS)
        profile.set_shape(spec.name, *shapes)
    assert config.add_optimization_profile(profile) >= 0
    assert builder.build_serialized_network(network, config) is not None, log.explain("")
    contents = read_contents(log.report, kv_length=bundle.manifest.geometry.cache_length)
    assert contents is not None
    require_sound(contents, bundle, num_profiles=1)
