"""A pass that does not do its work is refused by its own name."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import onnx_ir as ir

from cllm_export.errors import GraphError
from cllm_export.exporter.graph.linking import use_stored_matrices
from cllm_export.exporter.graph.model import DecoderGraph, WeightSource
from cllm_export.exporter.graph.passes import (
    fuse_rms_norm,
    name_hidden_states,
    run_passes,
    transpose_weights,
)


def graph_of(op_type: str, **attributes: object) -> DecoderGraph:
    """One operator over a weight [4, 2]."""
    value = ir.val("weight", ir.DataType.FLOAT, [4, 2])
    node = ir.node(op_type, [value], attributes)
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 23}, name="decoder")
    weights = {"weight": WeightSource(tensors=("weight",))}
    return DecoderGraph(model=ir.Model(graph, ir_version=10), precision="fp32", weights=weights)


def test_a_norm_of_an_unknown_form_is_refused():
    with pytest.raises(GraphError, match="fuse_rms_norm left a ReduceMean"):
        run_passes(graph_of("ReduceMean"), [fuse_rms_norm])


def test_a_graph_without_marks_between_its_layers_is_refused():
    with pytest.raises(GraphError, match="name_hidden_states found 0 markers for 0 layers"):
        run_passes(graph_of("Relu"), [name_hidden_states])


@pytest.mark.parametrize("step", [transpose_weights, use_stored_matrices])
def test_a_weight_that_would_be_transposed_at_run_time_is_refused(step, monkeypatch):
    """The pass is broken here: what it replaces is left in the graph."""
    monkeypatch.setattr(ir.convenience, "replace_all_uses_with", lambda *_: None)
    with pytest.raises(GraphError, match=f"{step.__name__} left"):
        run_passes(graph_of("Transpose", perm=[1, 0]), [step])
