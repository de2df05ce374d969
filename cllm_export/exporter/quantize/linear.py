"""Finds and replaces the linear layers of a finished graph, for quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import onnx_ir as ir

from cllm_export.bundle.contract import hidden_name
from cllm_export.errors import GraphError
from cllm_export.exporter.graph.model import DecoderGraph, WeightSource
from cllm_export.exporter.graph.rounding import Rounding


class Linear(NamedTuple):
    """One linear layer without its bias: rows times a weight."""

    node: ir.Node
    name: str
    """Name of its weight."""
    source: WeightSource
    """Source of the weight. Its rows are output channels, [out, in], before any transpose."""
    shape: tuple[int, int]
    """[out, in]"""

    @property
    def rows(self) -> ir.Value:
        """The input of the layer, [B, n, in] or [B h, in]."""
        value = self.node.inputs[0]
        assert value is not None
        return value


def linear_layers(graph: DecoderGraph) -> Iterator[Linear]:
    """Every MatMul or Gemm with a stored weight of two axes, in graph order.

    Raises:
        GraphError: a layer has a form that no pass of the exporter produces.
    """
    for node in list(graph.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.name not in graph.weights or weight.shape is None or len(weight.shape) != 2:
            continue
        source = graph.weights[str(weight.name)]
        first, second = (int(dim) for dim in weight.shape.dims)  # type: ignore[arg-type]
        if node.op_type == "Gemm" and not (_attribute(node, "transB") == 1 and len(node.inputs) == 2):
            raise GraphError(f"{weight.name} is read by a Gemm of an unknown form")
        shape = (second, first) if node.op_type == "MatMul" else (first, second)
        if source.transposed != (node.op_type == "MatMul"):
            raise GraphError(f"{weight.name} is stored {first} x {second}, not as a {node.op_type} of ours takes it")
        yield Linear(node, str(weight.name), source, shape)


def nodes_of_head(graph: DecoderGraph, num_layers: int) -> set[ir.Node]:
    """The nodes after the output of the last layer."""
    nodes = iter(graph.graph)
    last = hidden_name(num_layers)
    for node in nodes:
        if any(value.name == last for value in node.outputs):
            break
    return set(nodes)


def add_rounded(graph: DecoderGraph, linear: Linear, rounding: Rounding, *, transposed: bool) -> list[ir.Value]:
    """Add the parts of a layer's rounded weight to the graph: codes, scales, and offsets if it has them.

    ``transposed`` applies only to those with two axes. Offsets are always [groups, out], since a MatMul reads them.
    """
    out, width = linear.shape
    made = []
    for holds, row_shape in rounding.row_shapes(width).items():
        shape = (out, *row_shape)
        turned = len(shape) == 2 and (transposed or holds == "offsets")
        source = replace(linear.source, transposed=turned, rounding=rounding, holds=holds)
        made.append(graph.add_rounded(f"{linear.name}.{holds}", source, shape=shape[::-1] if turned else shape))
    return made


def put_in_place(graph: DecoderGraph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Replace one node by several; the last one gives the result."""
    result, old = nodes[-1].outputs[0], node.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    if old.name:  # the name of a value may be part of the contract
        name, old.name = old.name, None
        result.name = name
    graph.graph.remove(node, safe=True)


def _attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None
