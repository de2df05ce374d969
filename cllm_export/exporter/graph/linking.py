"""The passes for a graph whose weights stay in the checkpoint's files: the graph must take them as stored.

A checkpoint stores a linear layer as [out, in], but MatMul needs [in, out]. Gemm(transB=1) takes the stored form. The
alternative is Transpose and Concat nodes that the session folds at load. Measured forwards were as fast, but loading
was slower and kept a second copy of every matrix in memory (ARCHITECTURE.md). Gemm needs rows [B n, in], so the two
axes of the block are merged before it and split after it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from cllm_export.errors import GraphError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import PASSES, Pass, pack_qkv, transpose_weights

ELEMENTWISE = frozenset({"Add", "Mul", "Sigmoid", "Tanh", "Gelu", "Relu"})
"""Operators between two linear layers that give the same result on merged rows as on a block."""


def use_stored_matrices(graph: DecoderGraph) -> None:
    """MatMul(x, Transpose(weight)) (+ bias) -> Gemm(transB=1). Post: no Transpose of a weight is left."""
    rows = _Rows(graph)
    for node in [node for node in graph.graph if node.op_type == "Transpose" and _is_weight(graph, node.inputs[0])]:
        for matmul in [use.node for use in node.outputs[0].uses()]:
            _require(matmul.op_type == "MatMul" and matmul.inputs[1] is node.outputs[0], f"{node.name} feeds no MatMul")
            weight = node.inputs[0]
            assert weight is not None
            rows.make_gemm(matmul, weight)
    rows.stay_merged()
    optimizer.remove_unused_nodes(graph.model)
    left = [node.name for node in graph.graph if node.op_type == "Transpose" and _is_weight(graph, node.inputs[0])]
    _require(not left, f"use_stored_matrices left {left}")


LINKED_PASSES: tuple[Pass, ...] = tuple(
    use_stored_matrices if step is transpose_weights else step for step in PASSES if step is not pack_qkv
)
"""``PASSES`` for linked weights. Nothing is packed, because three matrices in a file cannot be read as one."""


class _Rows:
    """Merges [B, n, E] into rows [B n, E] and splits the axes again. All readers of a value share one such node."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._merged: dict[ir.Value, ir.Value] = {}
        self._apart: dict[ir.Value, ir.Value] = {}
        """Value with split axes -> the merged rows it is made from."""
        self._targets: dict[tuple[int, ...], ir.Value] = {}
        """Sizes of the last axes -> the graph value that holds the shape [B, n, *sizes]."""
        self._block: ir.Value | None = None

    def make_gemm(self, matmul: ir.Node, weight: ir.Value) -> None:
        rows, result = matmul.inputs[0], matmul.outputs[0]
        assert rows is not None and rows.shape is not None and weight.shape is not None
        flat = len(rows.shape) == 2
        bias, end = self._bias(result)
        inputs = [rows if flat else self.merge(rows, before=matmul), weight, *([bias] if bias is not None else [])]
        gemm = ir.node("Gemm", inputs, {"transB": 1})
        gemm.outputs[0].type = end.type
        self._graph.graph.insert_before(matmul, gemm)
        width = int(weight.shape[0])  # type: ignore[arg-type]
        made = gemm.outputs[0] if flat else self.tell_apart(gemm, width)
        made.shape = end.shape
        ir.convenience.replace_all_uses_with(end, made)

    def merge(self, value: ir.Value, *, before: ir.Node) -> ir.Value:
        if value not in self._merged:
            assert value.shape is not None
            width = int(value.shape[2])  # type: ignore[arg-type]
            producer = value.producer()
            reshaped = producer is not None and producer.op_type == "Reshape" and value not in self._apart
            source = producer.inputs[0] if reshaped and producer is not None else value
            node = ir.node("Reshape", [source, self._constant([-1, width])])
            node.outputs[0].type = value.type
            self._graph.graph.insert_before(before, node)
            self._merged[value] = node.outputs[0]
        return self._merged[value]

    def tell_apart(self, rows: ir.Node, width: int) -> ir.Value:
        node = ir.node("Reshape", [rows.outputs[0], self._target((width,))])
        node.outputs[0].type = rows.outputs[0].type
        self._graph.graph.insert_after(rows, node)
        self._apart[node.outputs[0]] = rows.outputs[0]
        return node.outputs[0]

    def stay_merged(self) -> None:
        """Keep rows merged through elementwise nodes between Gemms, and bypass Reshapes that cancel each other."""
        for node in list(self._graph.graph):
            inputs = [value for value in node.inputs if value is not None]
            if node.op_type in ELEMENTWISE and all(value in self._apart for value in inputs):
                self._move_inside(node, inputs)
        for value, merged in self._merged.items():
            if value in self._apart:
                ir.convenience.replace_all_uses_with(merged, self._apart[value])
        for value, merged in self._apart.items():
            for user in [use.node for use in value.uses() if use.node.op_type == "Reshape"]:
                self._reshape_at_once(user, merged)

    def _move_inside(self, node: ir.Node, inputs: list[ir.Value]) -> None:
        """split(a) op split(b) -> split(a op b), where split makes [B, n, E] from rows [B n, E]."""
        result = node.outputs[0]
        assert result.shape is not None
        width, shape = int(result.shape[2]), result.shape  # type: ignore[arg-type]
        for index, value in enumerate(inputs):
            node.replace_input_with(index, self._apart[value])
        result.shape = None
        users = [(use.node, use.idx) for use in result.uses()]
        apart = self.tell_apart(node, width)
        apart.shape = shape
        for user, index in users:
            user.replace_input_with(index, apart)
        if result in self._merged:
            self._merged[apart] = self._merged.pop(result)

    def _reshape_at_once(self, node: ir.Node, rows: ir.Value) -> None:
        """Split axes, then Reshape by heads -> one Reshape of the merged rows."""
        target = node.inputs[1]
        sizes = target.const_value.numpy().tolist() if target is not None and target.const_value is not None else []
        if len(sizes) > 2 and sizes[:2] == [0, 0] and min(sizes[2:]) > 0:
            node.replace_input_with(0, rows)
            node.replace_input_with(1, self._target(tuple(sizes[2:])))

    def _bias(self, result: ir.Value) -> tuple[ir.Value | None, ir.Value]:
        """The bias added to a product, or None, and the value that the Gemm replaces.

        An Add counts as a bias only if it is the product's only reader and its other input is a stored vector.
        """
        users = [use.node for use in result.uses()]
        if len(users) != 1 or users[0].op_type != "Add":
            return None, result
        other = next(value for value in users[0].inputs if value is not result)
        is_bias = _is_weight(self._graph, other) and other is not None and other.shape is not None
        return (other, users[0].outputs[0]) if is_bias and len(other.shape) == 1 else (None, result)  # type: ignore[union-attr, arg-type]

    def _target(self, sizes: tuple[int, ...]) -> ir.Value:
        """The shape [B, n, *sizes] as a value, computed once at the start of the graph."""
        if sizes not in self._targets:
            block = self._block_shape()
            node = ir.node("Concat", [block, self._constant(list(sizes))], {"axis": 0})
            producer = block.producer()
            assert producer is not None
            self._graph.graph.insert_after(producer, node)
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            node.outputs[0].shape = ir.Shape([2 + len(sizes)])
            self._targets[sizes] = node.outputs[0]
        return self._targets[sizes]

    def _block_shape(self) -> ir.Value:
        if self._block is None:
            ids = next(value for value in self._graph.graph.inputs if value.name == "input_ids")
            node = ir.node("Shape", [ids], {"start": 0, "end": 2})
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            node.outputs[0].shape = ir.Shape([2])
            self._graph.graph.insert_before(self._graph.graph[0], node)
            self._block = node.outputs[0]
        return self._block

    def _constant(self, values: list[int]) -> ir.Value:
        return self._graph.add_constant(values)


def _is_weight(graph: DecoderGraph, value: ir.Value | None) -> bool:
    return value is not None and value.name in graph.weights


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)
