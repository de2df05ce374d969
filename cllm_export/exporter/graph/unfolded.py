"""The graph that TensorRT parses: the greedy graph with one row of queries for each head, [B, H, n, D].

``fold_query_groups`` makes the heads that share a key/value head rows of one head. ONNX Runtime gains a tenth by it. In
TensorRT the folded form loses the attention kernel of one row, costs seven kernels a forward, and does not build at all
with one key/value head. So a bundle has both forms over the same weights. ONNX Runtime can run either, which is how the
two are compared without a GPU.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from cllm_export.bundle.contract import FixedShapes, Geometry
from cllm_export.errors import GraphError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import state_contract

MASK_INPUT = 3


def derive_unfolded(greedy: DecoderGraph, geometry: Geometry, fixed: FixedShapes | None = None) -> DecoderGraph | None:
    """Derive the unfolded graph from a finished greedy graph, which stays unchanged. None if no query is folded.

    Raises:
        GraphError: an attention is folded in a form that this pass does not know.
    """
    if geometry.num_heads == geometry.num_kv_heads or not greedy.count("Attention"):
        return None
    graph = greedy.copy()
    for attention in [node for node in graph.graph if node.op_type == "Attention"]:
        _unfold(attention)
    optimizer.remove_unused_nodes(graph.model)
    graph.drop_unused_weights()
    state_contract(graph, geometry, fixed)
    return graph


def _unfold(attention: ir.Node) -> None:
    """Let an Attention read the queries, the mask and give the result that it had before ``fold_query_groups``."""
    result = attention.outputs[0]
    rows, repeat = _producer(attention, 0, "Reshape"), _producer(attention, MASK_INPUT, "Concat")
    readers = [use.node for use in result.uses()]
    if len(readers) != 1 or readers[0].op_type != "Reshape" or len(set(repeat.inputs)) != 1:
        raise GraphError(f"{attention.name} has no folded query groups, which fold_query_groups makes")
    attention.replace_input_with(0, rows.inputs[0])
    attention.replace_input_with(MASK_INPUT, repeat.inputs[0])
    ir.convenience.replace_all_uses_with(readers[0].outputs[0], result)


def _producer(attention: ir.Node, index: int, op_type: str) -> ir.Node:
    value = attention.inputs[index]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != op_type:
        raise GraphError(f"input {index} of {attention.name} is no {op_type}, which fold_query_groups makes")
    return producer
