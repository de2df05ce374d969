"""Repeated layers: the graph is, node for node, the one that tracing every layer gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from cllm_export.exporter import pipeline
from cllm_export.exporter.checkpoint.read import Checkpoint, open_checkpoint
from cllm_export.exporter.graph.layers import repeat_layers, repeated_period
from cllm_export.exporter.graph.linking import LINKED_PASSES
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import PASSES, Pass, state_contract
from cllm_export.exporter.options import BuildOptions
from cllm_export.exporter.settle import settle
from cllm_export.exporter.stages import Stages
from tests.checkpoints import VARIANTS, Variant
from tests.conftest import Workshop

NUM_LAYERS = 5
ALTERNATING = ["sliding_attention", "full_attention"]


def quiet() -> Stages:
    return Stages(lambda _: None, lambda *_: None)


def traced(checkpoint: Checkpoint, num_layers: int, passes: Sequence[Pass]) -> DecoderGraph:
    return pipeline._trace(checkpoint.config, settle(BuildOptions(), checkpoint), num_layers, passes, quiet())


def told(graph: DecoderGraph, checkpoint: Checkpoint) -> list[Any]:
    """Inputs, outputs and every node with what it takes, by names that do not depend on how the graph was made."""
    state_contract(graph, settle(BuildOptions(), checkpoint).geometry)

    def name(value: ir.Value | None) -> Any:
        if value is None or value.const_value is None:
            return value and value.name
        return str(value.const_value.numpy().dtype), value.const_value.numpy().tolist()

    nodes = [
        (
            node.op_type,
            [name(value) for value in node.inputs],
            [value.name for value in node.outputs],
            str(node.attributes),
        )
        for node in graph.graph
    ]
    contract = [value.name for value in graph.graph.inputs if value.name not in graph.weights]
    return [contract, [value.name for value in graph.graph.outputs], dict(sorted(graph.weights.items())), nodes]


@pytest.mark.parametrize("passes", [PASSES, LINKED_PASSES], ids=["copied", "linked"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama-linear-bias-mqa", marks=pytest.mark.slow),
        "qwen2",
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
def test_repeating_a_layer_gives_the_graph_that_tracing_every_layer_gives(
    workshop: Workshop, name: str, passes: Sequence[Pass]
):
    from dataclasses import replace

    path = workshop.new_checkpoint(f"five-{name}-{len(passes)}", replace(VARIANTS[name], num_layers=NUM_LAYERS))
    checkpoint = open_checkpoint(path)
    assert period_of(checkpoint) == 1
    repeated = traced(checkpoint, 3, passes)
    assert repeat_layers(repeated, 1, NUM_LAYERS)
    every, short = told(traced(checkpoint, NUM_LAYERS, passes), checkpoint), told(repeated, checkpoint)
    assert short[:3] == every[:3]
    for ours, theirs in zip(short[3], every[3], strict=True):
        assert ours == theirs


def period_of(checkpoint: Checkpoint) -> int | None:
    return repeated_period(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})


def test_layers_of_two_kinds_repeat_by_twos_and_irregular_ones_not_at_all(tmp_path: Path, workshop: Workshop):
    window = {"use_sliding_window": True, "sliding_window": 256}
    variant = Variant(family="qwen2", num_layers=8, config={**window, "layer_types": ALTERNATING * 4})
    checkpoint = open_checkpoint(workshop.new_checkpoint("alternating", variant))
    assert period_of(checkpoint) == 2
    variant = Variant(family="qwen2", num_layers=8, config={**window, "max_window_layers": 3})
    assert period_of(open_checkpoint(workshop.new_checkpoint("irregular", variant))) is None


def test_few_layers_are_all_traced(workshop: Workshop):
    assert period_of(open_checkpoint(workshop.checkpoint("llama"))) is None
