"""The exported file: the operators, inputs and outputs that the contract promises, and the same bytes every time."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from cllm_export.bundle.contract import OPSET, TensorSpec, graph_inputs, graph_outputs
from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle
from cllm_export.exporter.lint.rules import NOT_PARSED, require_clean
from cllm_export.verification.tokens import MARGIN_EPSILON
from tests.checkpoints import MAX_POSITIONS, VARIANTS
from tests.conftest import Workshop
from tests.parity.compare import (
    NUM_NEW_TOKENS,
    assert_own_greedy_tokens,
    assert_same_tokens,
    first_difference,
    random_prompts,
)
from tests.parity.test_tokens import FIXED, JACOBI

FP16 = ("llama-llama3-bf16-sharded", "qwen2", "gemma2")
"""One untied (the head is a MatMul) and one tied (a Gemm); bf16 and fp32 on disk; without and with bias; norms of
1 + weight, a scaled embedding and capped scores."""
NORMS_A_LAYER = {"qwen3": 4, "qwen3-untied-bias": 4, "gemma2": 4, "gemma3": 6, "olmo2": 4, "stablelm-parallel": 7}
"""Where they are not two: norms of queries and keys, of what a block gives back; one a head."""
LAYER_NORM_FAMILIES = ("starcoder2", "stablelm")
NUM_ROTATIONS = {"smollm3": 2}
"""Where they are not two a layer."""
CAPPED = ("gemma2",)
"""Variants whose attention is spelled out, because TensorRT's has no softcap."""
PRIMITIVES = ("ReduceMean", "Pow", "Cos", "Sin", "Sqrt", "Softmax", "ScatterElements", "ScatterND")
"""What attention, norms, rotations and cache updates decay into if a pass misses them."""
ALIGNMENT = 4096

EXPORTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in VARIANTS),
    *FIXED.items(),
    *((name, {"precision": "fp16"}) for name in FP16),
]
IDS = [f"{name}-{'-'.join(options)}" if options else name for name, options in EXPORTS]
SLOW = {f"{name}-precision" for name in FP16[:2]}
"""Gemma 2 alone has fp16 in every run: it has all that is special about it."""
HALVED = ["llama-llama3-bf16-sharded", pytest.param("qwen2", marks=pytest.mark.slow), "gemma2"]
"""Of ``FP16``: an untied head and a tied one in every run; biases, which are cast as all else, with the slow tests."""
each_export = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*export, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, export in zip(IDS, EXPORTS, strict=True)
    ],
)

DTYPES = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


def graph_of(bundle: Bundle) -> ModelProto:
    return onnx.load(bundle.graph_path(), load_external_data=False)


@each_export
def test_every_exported_graph_is_sound_onnx_and_clean_by_the_lint(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    bundle = workshop.bundle(name, **options)
    parsed = bundle.graph_path(bundle.tensorrt_graph)
    for path in (bundle.graph_path(), parsed):
        onnx.checker.check_model(str(path))
    require_clean(graph_of(bundle), waived=NOT_PARSED)
    require_clean(onnx.load(parsed, load_external_data=False))


@each_export
def test_every_exported_graph_has_single_operators_of_the_default_domain(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    bundle = workshop.bundle(name, **options)
    model, layers = graph_of(bundle), bundle.manifest.geometry.num_layers
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET == 24
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    counts = Counter(node.op_type for node in model.graph.node)
    norms = NORMS_A_LAYER.get(name, 2) * layers + 1
    expected = {"TensorScatter": 2 * layers, "RotaryEmbedding": NUM_ROTATIONS.get(name, 2 * layers), "ArgMax": 1}
    kinds = ("RMSNormalization", "LayerNormalization")
    norm, other = reversed(kinds) if bundle.manifest.family in LAYER_NORM_FAMILIES else kinds
    expected |= {norm: norms, other: 0} | dict.fromkeys(PRIMITIVES, 0)
    capped = layers if name in CAPPED else 0
    num_tanh = capped + 1 if capped else 0  # one more caps the logits
    expected |= {"Attention": layers - capped, "Softmax": capped, "Tanh": num_tanh}
    assert {operator: counts[operator] for operator in expected} == expected


@each_export
def test_every_exported_graph_has_the_inputs_and_outputs_of_the_contract(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    manifest = workshop.bundle(name, **options).manifest
    graph = graph_of(workshop.bundle(name, **options)).graph
    fixed = manifest.graphs["greedy"].fixed_shapes
    assert (fixed is not None) == options.get("fixed_shapes", False)
    assert _specs(graph.input) == graph_inputs(manifest.geometry, manifest.precision, fixed)
    assert _specs(graph.output) == graph_outputs(manifest.geometry, manifest.precision, fixed)


@each_export
def test_all_weights_lie_once_and_aligned_in_the_one_weights_file(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    bundle = workshop.bundle(name, **options)
    tensors = _external(graph_of(bundle).graph)
    places = sorted((entry["offset"], entry["length"]) for entry in tensors.values())
    for (offset, length), (following, _) in itertools.pairwise(places):
        assert offset % ALIGNMENT == 0
        assert offset + length <= following < offset + length + ALIGNMENT, "weights overlap, or leave a hole"
    assert sum(places[-1]) == bundle.file(WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize(
    ("name", "has_window"),
    [("mistral-window", False), ("mistral-sliding", True), ("ministral", True), ("qwen2-window", False)],
)
def test_only_a_window_shorter_than_the_max_length_costs_a_mask(workshop: Workshop, name: str, has_window: bool):
    counts = Counter(node.op_type for node in graph_of(workshop.bundle(name)).graph.node)
    assert (counts["And"], counts["Greater"]) == ((1, 1) if has_window else (0, 0))


@pytest.mark.parametrize("name", HALVED)
def test_fp16_halves_the_weights_and_the_kv_cache(workshop: Workshop, name: str):
    single, half = workshop.bundle(name), workshop.bundle(name, precision="fp16")
    past = [spec for spec in _specs(graph_of(half).graph.input) if spec.name.startswith("past_")]
    assert {spec.dtype for spec in past} == {"float16"}
    lengths = [_float_bytes(graph_of(bundle).graph) for bundle in (single, half)]
    assert lengths[0] == 2 * lengths[1]
    padding = ALIGNMENT * len(_external(graph_of(half).graph))
    assert half.file(WEIGHTS_NAME).stat().st_size < single.file(WEIGHTS_NAME).stat().st_size / 2 + padding


@pytest.mark.parametrize("name", HALVED)
def test_fp16_gives_the_checkpoints_tokens_but_for_small_margins_and_stays_lossless(workshop: Workshop, name: str):
    """fp16 keeps 11 bits: logits of a spread of 2.5 move by about 0.01, so 0.1 as ``verify`` states it is ample.

    Jacobi against autoregressive at one shape is required to be equal in any precision.
    """
    model, reference = workshop.model(name, precision="fp16"), workshop.reference(name)
    for prompt in random_prompts(model.engine.geometry.vocab_size):
        what = f"{name}, prompt of {len(prompt)}"
        options = {"max_new_tokens": NUM_NEW_TOKENS, "block_size": 8}
        expected = model.generate(prompt, method="autoregressive", **options).token_ids
        assert_own_greedy_tokens(reference, prompt, expected, epsilon=MARGIN_EPSILON["fp16"], what=what)
        for method in JACOBI:
            actual = model.generate(prompt, method=method, **options).token_ids
            assert_same_tokens(actual, expected, f"{what}, {method}")


def test_two_builds_of_one_checkpoint_give_the_same_bytes_and_fingerprint(workshop: Workshop):
    first, second = workshop.bundle("small"), workshop.build(workshop.checkpoint("small"))
    for name in first.manifest.files:
        at = first_difference(first.file(name).read_bytes(), second.file(name).read_bytes())
        assert at is None, f"{name} differs from byte {at} on"
    assert second.fingerprint == first.fingerprint


def test_the_manifest_says_how_the_model_was_trained_and_what_ends_it(workshop: Workshop):
    manifest = workshop.bundle("qwen2").manifest
    assert manifest.trained_with is not None
    assert vars(manifest.trained_with) == {"block_size": 4, "proposer": "prompt", "loop": "block"}
    assert manifest.block_size == 4
    assert manifest.max_length == MAX_POSITIONS
    assert manifest.eos_token_ids == (2, *range(60, 80))
    assert manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert {"torch", "transformers", "onnx"} <= manifest.tool_versions.keys()


def _specs(values: list[ValueInfoProto]) -> list[TensorSpec]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(name=value.name, dtype=DTYPES[tensor.elem_type], shape=shape))
    return specs


def _external(graph: GraphProto) -> dict[str, dict[str, int]]:
    """Offset and length of every initializer in the weights file, by name."""
    places = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == WEIGHTS_NAME
            places[tensor.name] = {key: int(entries[key]) for key in ("offset", "length")}
    return places


def _float_bytes(graph: GraphProto) -> int:
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type != TensorProto.INT64}
    return sum(entry["length"] for name, entry in _external(graph).items() if name in floats)
