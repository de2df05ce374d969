"""The lookahead graph beside the greedy one of its bundle, and the tokens of lookahead decoding on real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cllm_export.bundle.contract import Batch, graph_outputs, lookahead_inputs
from cllm_export.bundle.manifest import GREEDY_GRAPH, LOOKAHEAD_GRAPH, Bundle, open_bundle
from cllm_export.errors import EngineError, GraphError, OptionError
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.graph.lookahead import derive_lookahead
from cllm_export.exporter.graph.passes import PASSES, name_replaceable_values, state_contract
from cllm_export.exporter.lint.rules import NOT_PARSED, require_clean
from cllm_export.exporter.options import BuildOptions
from cllm_export.exporter.pipeline import _trace, export
from cllm_export.exporter.settle import settle
from cllm_export.exporter.stages import Stages
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape, layout_of
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.verification.tokens import MARGIN_EPSILON as VERIFY_EPSILON
from tests.checkpoints import MAX_POSITIONS, WINDOW
from tests.conftest import DEMO, THREADS, Workshop
from tests.parity.compare import (
    MARGIN_EPSILON,
    NUM_NEW_TOKENS,
    assert_own_greedy_tokens,
    fill_cache,
    first_difference,
    random_prompts,
    read_cache,
)
from tests.parity.test_graph import _external, _specs

EXPORTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"weights": "link"}),
    ("llama-linear-bias-mqa", {}),
    ("smollm3", {}),
    ("gemma2", {"max_length": WINDOW}),
    ("llama-llama3-bf16-sharded", {"precision": "fp16"}),
]
"""Grouped queries and one key/value head, biases, linked weights, layers without rotation, attention spelled out, fp16;
and a length within which no window matters."""
IDS = ["-".join((name, *map(str, options.values()))) for name, options in EXPORTS]
each_export = pytest.mark.parametrize(("name", "options"), EXPORTS, ids=IDS)
DECODED = ("llama", "qwen2", "llama-linear-bias-mqa")
SHAPES = (LookaheadShape(), LookaheadShape(window=1, ngram=2, guesses=1), LookaheadShape(window=3, ngram=5, guesses=2))
DEMO_PROMPTS = 20
SCATTERED = LookaheadShape(window=4, ngram=4, guesses=3)


def bundle_of(workshop: Workshop, name: str, options: dict[str, Any]) -> Bundle:
    return workshop.bundle(name, lookahead=True, **options)


def graph_of(bundle: Bundle, graph: str = LOOKAHEAD_GRAPH) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(graph), load_external_data=False)


@each_export
def test_the_graph_is_sound_onnx_clean_by_the_lint_and_has_the_contracts_inputs_and_outputs(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    bundle = bundle_of(workshop, name, options)
    model, manifest = graph_of(bundle), bundle.manifest
    assert LOOKAHEAD_GRAPH in manifest.graphs
    if not manifest.linked_files:  # the checker wants every file beside the graph
        onnx.checker.check_model(str(bundle.graph_path(LOOKAHEAD_GRAPH)))
    require_clean(model, waived=NOT_PARSED)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    found = [(value.name, _dims(value)) for value in model.graph.input]
    assert found == [(spec.name, spec.shape) for spec in lookahead_inputs(manifest.geometry, manifest.precision)]
    assert _specs(model.graph.output) == graph_outputs(manifest.geometry, manifest.precision)


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


@each_export
def test_it_differs_from_the_greedy_graph_in_positions_and_mask_alone(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    """From the first embedding on both have the same operators; and every weight lies where the greedy graph has it."""
    bundle = bundle_of(workshop, name, options)
    ours, theirs = graph_of(bundle), graph_of(bundle, GREEDY_GRAPH)
    assert _operators(ours) == _operators(theirs)
    if not bundle.manifest.linked_files:
        places = _external(theirs.graph)
        assert _external(ours.graph) == {name: place for name, place in places.items() if name != "row_numbers"}


def _operators(model: onnx.ModelProto) -> list[str]:
    operators = [node.op_type for node in model.graph.node]
    first = next(index for index, node in enumerate(model.graph.node) if node.op_type == "Gather" and _embeds(node))
    return operators[first:]


def _embeds(node: onnx.NodeProto) -> bool:
    return "input_ids" in node.input and "embed" in node.input[0]


@each_export
def test_a_causal_mask_and_ascending_offsets_give_the_greedy_graphs_bits(
    workshop: Workshop, name: str, options: dict[str, Any]
):
    """The same numbers go through the same operators in the same shapes: equality is required, of tokens and of KV."""
    bundle = bundle_of(workshop, name, options)
    size, past = 9, min(40, bundle.manifest.max_length - 9)
    outcomes = []
    for graph in (GREEDY_GRAPH, LOOKAHEAD_GRAPH):
        engine = OrtEngine(bundle, num_slots=2, threads=THREADS)
        first, second, block = random_prompts(engine.geometry.vocab_size, [past, past // 2, size])
        engine.prefill(Batch([first, first], [past, 0], [0, 0]))
        engine.prefill(Batch([second, second], [0, past // 2], [past, 0]))
        given = ([block, block[::-1]], [1, 3], [past, past // 2])
        if graph == GREEDY_GRAPH:
            forward = engine.forward(Batch(*given))
        else:
            forward = engine.forward_rows(Batch(*given), np.arange(size), np.tri(size, dtype=bool))
        rows = [array.tobytes() for array in read_cache(engine).values()]
        outcomes.append([forward.next_ids, forward.num_accepted, *rows])
    assert outcomes[0] == outcomes[1]


def test_the_graph_gives_the_same_bits_through_a_devices_buffers(workshop: Workshop):
    bundle, layout, outcomes = bundle_of(workshop, "llama", {}), layout_of(SCATTERED, 2), []
    for copies in (False, True):
        engine = OrtEngine(bundle, num_slots=2, threads=THREADS, copies=copies)
        prompt, block = random_prompts(engine.geometry.vocab_size, [40, len(layout.offsets)])
        engine.prefill(Batch([prompt, prompt[::-1]], [40, 40], [0, 0]))
        forward = engine.forward_rows(Batch([block, block], [2, 0], [40, 30]), layout.offsets, layout.mask)
        outcomes.append([forward, *(array.tobytes() for array in read_cache(engine).values())])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-linear-bias-mqa", "smollm3"])
def test_every_row_predicts_as_the_text_that_it_sees_alone(workshop: Workshop, name: str):
    """A layout's rows, each against the greedy graph over the text that its mask picks: equal but where the margin is
    under MARGIN_EPSILON, for the blocks' shapes differ, and so may rounding."""
    bundle = bundle_of(workshop, name, {})
    engine, reference = OrtEngine(bundle, num_slots=1, threads=THREADS), workshop.reference(name)
    layout = layout_of(SCATTERED, 2)
    prompt, block = random_prompts(engine.geometry.vocab_size, [50, SCATTERED.num_rows(2)])
    engine.prefill(Batch([prompt], [50], [0]))
    found = engine.forward_rows(Batch([block], [2], [50]), layout.offsets, layout.mask).next_ids[0]
    for row in range(len(block)):
        seen = sorted(np.flatnonzero(layout.mask[row]), key=lambda each: layout.offsets[each])
        text = prompt + [block[other] for other in seen]
        [step] = reference.predict(text, [0])
        assert found[row] == step.token or step.margin < MARGIN_EPSILON, f"row {row} of {name}"


def test_nothing_of_the_cache_above_the_write_index_is_seen(workshop: Workshop):
    """Dead rows hold large numbers here: equality is required."""
    engine = OrtEngine(bundle_of(workshop, "llama", {}), num_slots=1, threads=THREADS)
    layout = layout_of(SCATTERED, 1)
    prompt, block = random_prompts(engine.geometry.vocab_size, [30, SCATTERED.num_rows(1)])
    found = []
    for poison in (0.0, 1e4):
        fill_cache(engine, poison)
        engine.prefill(Batch([prompt], [30], [0]))
        found.append(engine.forward_rows(Batch([block], [1], [30]), layout.offsets, layout.mask).next_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"W{shape.window}-N{shape.ngram}-G{shape.guesses}")
@pytest.mark.parametrize("name", DECODED)
def test_lookahead_gives_the_tokens_of_autoregressive_decoding(workshop: Workshop, name: str, shape: LookaheadShape):
    """Shapes differ, and so may rounding: equal but where the margin is under MARGIN_EPSILON."""
    model = load(bundle_of(workshop, name, {}).path, threads=THREADS)
    for prompt in random_prompts(model.engine.geometry.vocab_size):
        found, expected = both(model, prompt, shape, max_new_tokens=NUM_NEW_TOKENS)
        what = f"{name}, prompt of {len(prompt)}"
        assert_equal_but_for_ties(workshop.reference(name), prompt, found, expected, MARGIN_EPSILON, what)


def both(model: Model, prompt: Any, shape: LookaheadShape, **options: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = model.generate(
        prompt, method="lookahead", window=shape.window, ngram=shape.ngram, guesses=shape.guesses, **options
    )
    expected = model.generate(prompt, method="autoregressive", **options)
    return found.token_ids, expected.token_ids


def assert_equal_but_for_ties(reference, prompt, found, expected, epsilon: float, what: str) -> None:
    at = first_difference(found, expected)
    if at is not None:
        assert_own_greedy_tokens(reference, prompt, found, epsilon=epsilon, what=what)
        margin = reference.predict(prompt, found[: at + 1])[at].margin
        assert margin < epsilon, f"{what}: first difference at token {at}, margin {margin:.2g}"


def test_the_demo_decodes_losslessly_with_fewer_forwards(workshop: Workshop):
    model, reference = load(bundle_of(workshop, "demo", {}).path, threads=THREADS), workshop.reference("demo")
    tokens = forwards = 0
    for prompt in read_prompts(DEMO / "prompts.jsonl", limit=DEMO_PROMPTS):
        ids = model.encode(prompt.content)
        found, expected = both(model, ids, LookaheadShape())
        assert_equal_but_for_ties(reference, ids, found, expected, VERIFY_EPSILON["fp32"], f"demo, prompt {prompt.id}")
        statistics = model.generate(ids, method="lookahead").statistics
        tokens, forwards = tokens + statistics.new_tokens, forwards + statistics.forwards
    assert tokens / forwards > 1.5


def test_other_slots_keep_out_of_a_lookahead_request(workshop: Workshop):
    bundle = bundle_of(workshop, "llama", {})
    alone, among = load(bundle.path, threads=THREADS), load(bundle.path, threads=THREADS, num_slots=3)
    [prompt] = random_prompts(alone.engine.geometry.vocab_size, [40])
    tokens = [each.generate(prompt, method="lookahead", max_new_tokens=20).token_ids for each in (alone, among)]
    assert tokens[0] == tokens[1]


def test_both_graphs_update_one_cache_in_place(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    engine = OrtEngine(bundle_of(workshop, "llama", {}), num_slots=1, threads=THREADS, log_severity=2)
    addresses = engine.cache_addresses
    engine.prefill(Batch([[1] * 8], [8], [0]))
    engine.forward_rows(Batch([[1] * 4], [1], [8]), np.arange(4), np.tri(4, dtype=bool))
    engine.forward(Batch([[1] * 4], [1], [9]))
    assert capfd.readouterr().err == ""
    assert engine.cache_addresses == addresses
    for array in read_cache(engine).values():
        assert np.all(np.any(array[0, :, :13], axis=(0, 2)))
        assert not np.any(array[0, :, 13:])


@pytest.mark.parametrize(
    ("block", "offsets", "mask"),
    [
        ([[1, 2, 3]], np.arange(2), np.tri(3, dtype=bool)),
        ([[1, 2, 3]], np.arange(3), np.tri(2, dtype=bool)),
        ([[1, 2, 3], [1, 2, 3]], np.arange(3), np.tri(3, dtype=bool)),
    ],
)
def test_offsets_or_a_mask_of_another_size_are_refused(workshop: Workshop, block: Any, offsets: Any, mask: Any):
    engine = OrtEngine(bundle_of(workshop, "llama", {}), num_slots=1, threads=THREADS)
    with pytest.raises(EngineError):
        engine.forward_rows(Batch(block, [1], [0]), offsets, mask)


def test_a_bundle_without_the_graph_runs_as_before_and_says_how_to_build_one(workshop: Workshop):
    model = workshop.model("llama")
    assert LOOKAHEAD_GRAPH not in workshop.bundle("llama").manifest.graphs
    with pytest.raises(OptionError, match=r"has no lookahead graph: build it with: cllm-export build .* --lookahead"):
        model.generate([5, 6], method="lookahead")
    assert model.generate([5, 6], max_new_tokens=3).token_ids


def test_a_model_that_can_have_no_lookahead_graph_gets_its_greedy_graph_and_the_reason(
    workshop: Workshop, tmp_path: Path
):
    reason = f"layers of this model see {WINDOW} tokens of the max length {MAX_POSITIONS}"
    checkpoint, said = workshop.checkpoint("mistral-sliding"), list[str]()
    done = export(checkpoint, tmp_path / "bundle", BuildOptions(lookahead=True), say=said.append)
    assert LOOKAHEAD_GRAPH not in done.report.graphs
    assert reason in str(done.report.lookahead_refused)
    assert any(line.startswith("no lookahead graph: ") and reason in line for line in said)
    assert LOOKAHEAD_GRAPH not in open_bundle(tmp_path / "bundle").manifest.graphs


def test_a_greedy_graph_whose_mask_has_no_name_is_refused_by_the_name(workshop: Workshop):
    checkpoint = open_checkpoint(workshop.checkpoint("small"))
    settings = settle(BuildOptions(), checkpoint)
    passes = [step for step in PASSES if step is not name_replaceable_values]
    graph = _trace(checkpoint.config, settings, 1, passes, Stages(lambda _: None, lambda *_: None))
    state_contract(graph, settings.geometry)
    with pytest.raises(GraphError, match="no value named 'positions'"):
        derive_lookahead(graph, settings.geometry)


def test_deriving_leaves_the_greedy_graph_as_it_is(workshop: Workshop):
    """With and without ``lookahead`` the greedy graph of a bundle has the same bytes."""
    plain, both_graphs = workshop.bundle("llama"), bundle_of(workshop, "llama", {})
    assert plain.graph_path().read_bytes() == both_graphs.graph_path().read_bytes()
