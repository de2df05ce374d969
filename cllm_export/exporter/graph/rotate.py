"""Rotates what a decoder computes with, so that no channel is far above the others, and changes no result.

Two foldable rotations of SpinQuant (arXiv 2405.16406) are applied. The first turns the residual stream: whatever writes
it writes rotated values, and whatever reads it expects them. Between them is only an RMS norm, whose scale the readers
take over; what is left of it keeps every rotation. The second turns each head of the values in the KV cache, which
attention only adds up. Both are folded into weights, so a forward takes no longer.

Whether a model can be rotated is read from its graph, and not from its family or from names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor

from cllm_export.bundle.quantization import Rotated
from cllm_export.exporter.checkpoint.read import HEAD
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rotation import ColumnRotation, Rotation, RowRotation

UNIT_NORM = "unit_norm"
"""Name of the constant that replaces the scale of a norm whose readers took it over."""

IsWeight = Callable[[ir.Value], bool]
ReadTensor = Callable[[str], Tensor]
"""Gives a checkpoint tensor by its name, as stored. Only norms are read, and no adapter changes them."""


class NotRotatable(Exception):  # noqa: N818 - an answer within this module, not an error of the project
    """Why a part of a graph cannot be rotated."""


class Reader(NamedTuple):
    """A linear layer whose input is rotated."""

    node: ir.Node
    rotation: Rotation
    norm: ir.Node | None = None
    """The norm whose scale the layer takes over."""


class Writer(NamedTuple):
    """A weight or bias whose output is rotated."""

    value: ir.Value
    rotation: Rotation
    start: int
    stop: int


@dataclass(kw_only=True)
class RotationPlan:
    """What a rotation of a graph changes."""

    rotated: tuple[Rotated, ...] = ()
    refused: dict[Rotated, str] = field(default_factory=dict)
    """What cannot be rotated -> why."""
    table: ir.Node | None = None
    """The look-up of the embedding; None if the residual stream is not rotated."""
    readers: list[Reader] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    unties: bool = False
    """Whether the head gets a weight of its own, which was the embedding."""


def rotate(graph: DecoderGraph, read: ReadTensor) -> RotationPlan:
    """Rotate the residual stream and the values of a finished greedy graph, as far as its function stays the same.

    ``graph.spread`` then holds the inputs of linear layers whose channels are mixed.
    """
    plan = plan_rotation(graph.graph, lambda value: value.name in graph.weights)
    _Folding(graph, read).apply(plan)
    return plan


def plan_rotation(graph: ir.Graph, is_weight: IsWeight) -> RotationPlan:
    """Find what can be rotated in a greedy graph whose weights are told by ``is_weight``."""
    plan = RotationPlan()
    parts: tuple[tuple[Rotated, Callable[[ir.Graph, IsWeight], RotationPlan]], ...] = (
        ("residual", _residual),
        ("values", _values),
    )
    for name, find in parts:
        try:
            found = find(graph, is_weight)
        except NotRotatable as reason:
            plan.refused[name] = str(reason)
            continue
        plan.rotated += (name,)
        plan.table, plan.unties = plan.table or found.table, plan.unties or found.unties
        plan.readers += found.readers
        plan.writers += found.writers
    return plan


class _Folding:
    """Puts the rotations of a plan into the sources of a graph's weights."""

    def __init__(self, graph: DecoderGraph, read: ReadTensor) -> None:
        self._graph = graph
        self._read = read

    def apply(self, plan: RotationPlan) -> None:
        if plan.table is not None:
            table = plan.table.inputs[0]
            assert table is not None and table.shape is not None
            self._untie(table)
            self._turn_columns(table, ColumnRotation(rotation=Rotation(_dims(table)[1])))
        for node, rotation, norm in plan.readers:
            weight = node.inputs[1]
            assert weight is not None
            scale = self._scale(norm) if norm is not None else None
            self._turn_columns(weight, ColumnRotation(rotation=rotation, scale=scale))
            rows = node.inputs[0]
            assert rows is not None
            self._graph.spread.add(rows)
        for value, rotation, start, stop in plan.writers:
            name = str(value.name)
            turned = RowRotation(rotation=rotation, start=start, stop=stop)
            self._graph.weights[name] = replace(self._graph.weights[name], rows=turned)
        for norm in {reader.norm: None for reader in plan.readers if reader.norm is not None}:
            norm.replace_input_with(1, self._unit(norm))
        self._graph.drop_unused_weights()

    def _untie(self, table: ir.Value) -> None:
        """Give the head a weight of its own: only the head takes over the scale of the last norm."""
        for node in [use.node for use in table.uses() if use.node.op_type == "Gemm"]:
            source = self._graph.weights[str(table.name)]
            head = self._graph.add_weight(HEAD, source, shape=_dims(table), like=table)
            node.replace_input_with(1, head)

    def _turn_columns(self, value: ir.Value, columns: ColumnRotation) -> None:
        name = str(value.name)
        self._graph.weights[name] = replace(self._graph.weights[name], columns=columns)

    def _scale(self, norm: ir.Node) -> Tensor:
        value = norm.inputs[1]
        assert value is not None
        source = self._graph.weights[str(value.name)]
        return self._read(source.tensors[0]).double() + source.offset

    def _unit(self, norm: ir.Node) -> ir.Value:
        """A scale of ones, which all norms share."""
        scale = norm.inputs[1]
        assert scale is not None and scale.dtype is not None
        return self._graph.add_shared(UNIT_NORM, torch.ones(_dims(scale)), like=scale)


def _residual(graph: ir.Graph, is_weight: IsWeight) -> RotationPlan:
    """The rotation of the residual stream: what the embedding and Adds make, and what reads it.

    Raises:
        NotRotatable: something reads or writes it that a rotation would change.
    """
    look_up = next((node for node in graph if _is_look_up(node, is_weight)), None)
    if look_up is None:
        raise NotRotatable("no embedding starts a residual stream")
    table = look_up.inputs[0]
    assert table is not None
    rotation = Rotation(_dims(table)[1])
    plan = RotationPlan(table=look_up)
    stream, waiting = {look_up.outputs[0]}, [look_up.outputs[0]]
    branches: list[ir.Value] = []
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            raise NotRotatable("the residual stream is an output of the graph")
        for node, index in [(use.node, use.idx) for use in value.uses()]:
            if node.op_type == "RMSNormalization" and index == 0:
                plan.readers += _readers(node, rotation, table, is_weight)
                continue
            other = node.inputs[1 - index] if node.op_type in ("Add", "Mul") else None
            if other is None or (node.op_type == "Mul" and not _is_scalar(other)):
                raise NotRotatable(f"a {node.op_type} reads the residual stream")
            if node.op_type == "Add":
                branches.append(other)
            if node.outputs[0] not in stream:
                stream.add(node.outputs[0])
                waiting.append(node.outputs[0])
    for value in dict.fromkeys(branches):
        if value not in stream:
            plan.writers += _writers(value, rotation, is_weight)
    _require_tied_head(table, plan)
    return plan


def _readers(norm: ir.Node, rotation: Rotation, table: ir.Value, is_weight: IsWeight) -> list[Reader]:
    """The linear layers that read a norm of the residual stream."""
    scale = norm.inputs[1]
    if scale is None or not is_weight(scale) or len(scale.uses()) > 1:
        raise NotRotatable("a norm of the residual stream has no scale of its own")
    readers, waiting = [], [norm.outputs[0]]
    while waiting:
        value = waiting.pop()
        for node, index in [(use.node, use.idx) for use in value.uses()]:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            if node.op_type in ("MatMul", "Gemm") and index == 0 and _is(weight, is_weight):
                assert weight is not None
                if len(weight.uses()) > 1 and weight is not table:
                    raise NotRotatable(f"{weight.name} is read by several layers")
                if len(node.inputs) > 2:
                    raise NotRotatable(f"{weight.name} is read by a Gemm with a bias")
                readers.append(Reader(node, rotation, norm))
            elif node.op_type in ("Gather", "Reshape") and index == 0:  # they pick the rows of the head
                waiting.append(node.outputs[0])
            else:
                raise NotRotatable(f"a {node.op_type} reads a norm of the residual stream")
    return readers


def _writers(value: ir.Value, rotation: Rotation, is_weight: IsWeight) -> list[Writer]:
    """The weight, and any bias, of the linear layer that makes a value which is added to the residual stream."""
    found = []
    while True:
        node = value.producer()
        if node is None or len(value.uses()) > 1 or node.op_type not in ("Mul", "Add", "MatMul"):
            raise NotRotatable(f"a {node.op_type if node else 'graph input'} is added to the residual stream")
        if node.op_type == "Mul":
            value = _one_of(node, _is_scalar)[1]
            continue
        weight, rows = _one_of(node, is_weight)
        if len(weight.uses()) > 1:
            raise NotRotatable(f"{weight.name} is read by several layers")
        found.append(Writer(weight, rotation, 0, rotation.width))
        if node.op_type == "MatMul":
            return found
        value = rows


def _require_tied_head(table: ir.Value, plan: RotationPlan) -> None:
    """The embedding may be read by its look-up and by the head, and by nothing else."""
    known = {reader.node for reader in plan.readers} | {plan.table}
    if others := [use.node for use in table.uses() if use.node not in known]:
        raise NotRotatable(f"a {others[0].op_type} reads the embedding too")
    plan.unties = len(table.uses()) > 1


def _values(graph: ir.Graph, is_weight: IsWeight) -> RotationPlan:
    """The rotation of the values of every layer.

    Raises:
        NotRotatable: in a layer they are not only projected, cached, added up by attention and projected again.
    """
    plan = RotationPlan()
    for node in graph:
        past = node.inputs[0] if node.op_type == "TensorScatter" else None
        if past is None or not str(past.name).startswith("past_value."):
            continue
        assert past.shape is not None
        kv_heads, width = int(past.shape[1]), int(past.shape[3])  # type: ignore[arg-type]
        rotation = Rotation(width)
        block = node.inputs[1]
        assert block is not None
        plan.writers += _value_writers(block, rotation, kv_heads * width, is_weight)
        plan.readers.append(_value_reader(node.outputs[0], rotation, is_weight))
    if not plan.readers:
        raise NotRotatable("no layer has values in a KV cache")
    return plan


def _value_writers(value: ir.Value, rotation: Rotation, rows: int, is_weight: IsWeight) -> list[Writer]:
    """The rows of the projection, and of any bias, that make a block of values [B, K, n, D] or a view of it."""
    cut: _Cut | None = None
    found = []
    while True:
        node = value.producer()
        if node is None or (len(value.uses()) > 1 and cut is None):
            raise NotRotatable("the values of a layer are read by more than its KV cache")
        if node.op_type in ("Split", "Slice") and cut is None:
            cut = _cut_of(node, value)
            source = node.inputs[0]
        elif node.op_type in ("Add", "MatMul"):
            weight, source = _one_of(node, is_weight)
            if len(weight.uses()) > 1:
                raise NotRotatable(f"{weight.name} is read by several layers")
            start = cut.first_row(_dims(weight)[-1], rows) if cut else 0
            found.append(Writer(weight, rotation, start, start + rows))
            if node.op_type == "MatMul":
                return found
        elif _keeps_last_axis(node):
            source = node.inputs[0]
        else:
            raise NotRotatable(f"a {node.op_type} makes the values of a layer")
        assert source is not None
        value = source


class _Cut(NamedTuple):
    """The part of a joint projection that holds the values, in units of its parts."""

    start: int
    stop: int
    total: int | None
    """The sum of all parts; None if a part is counted in rows."""

    def first_row(self, out: int, rows: int) -> int:
        """The first row of the part, in a projection with ``out`` rows."""
        unit = out // self.total if self.total else 1
        if min(self.stop * unit, out) - self.start * unit != rows:
            raise NotRotatable(f"{rows} rows make the values of a layer, and its graph takes others")
        return self.start * unit


def _cut_of(node: ir.Node, value: ir.Value) -> _Cut:
    if node.op_type == "Split":
        sizes, index = _numbers(node.inputs[1]), list(node.outputs).index(value)
        return _Cut(sum(sizes[:index]), sum(sizes[: index + 1]), sum(sizes))
    start, stop = _bounds(node)
    source = node.inputs[0]
    assert source is not None
    for other in [use.node for use in source.uses() if use.node is not node]:
        bounds = _bounds(other) if other.op_type == "Slice" else None
        if bounds is None or (bounds[0] < stop and start < bounds[1]):
            raise NotRotatable(f"a {other.op_type} reads the values of a layer too")
    return _Cut(start, stop, None)


def _bounds(node: ir.Node) -> tuple[int, int]:
    """The columns that a Slice of the last axis of [B, n, out] keeps."""
    if _numbers(node.inputs[3]) != [2]:
        raise NotRotatable("a Slice of another axis makes the values of a layer")
    return _numbers(node.inputs[1])[0], _numbers(node.inputs[2])[0]


def _value_reader(value: ir.Value, rotation: Rotation, is_weight: IsWeight) -> Reader:
    """The projection that reads what attention makes of a cache of values."""
    attended = False
    while True:
        uses = [(use.node, use.idx) for use in value.uses()]
        if len(uses) != 1:
            raise NotRotatable("the values of a layer are read by more than its attention")
        node, index = uses[0]
        weight = node.inputs[1] if node.op_type == "MatMul" and index == 0 else None
        if attended and _is(weight, is_weight):
            assert weight is not None
            if len(weight.uses()) > 1 or _dims(weight)[0] % rotation.width:
                raise NotRotatable(f"{weight.name} is read by several layers, or takes no whole heads")
            return Reader(node, rotation)
        if (node.op_type, index) in (("Attention", 2), ("MatMul", 1)) and not attended:
            attended = True
        elif not _keeps_last_axis(node) and (attended or node.op_type != "Slice" or _numbers(node.inputs[3]) != [2]):
            raise NotRotatable(f"a {node.op_type} reads the values of a layer")
        value = node.outputs[0]


def _keeps_last_axis(node: ir.Node) -> bool:
    """Whether a node only arranges whole rows of the last axis, or joins and splits that axis in order."""
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints()
        return perm[-1] == len(perm) - 1
    return node.op_type == "Reshape"


def _one_of(node: ir.Node, holds: Callable[[ir.Value], bool]) -> tuple[ir.Value, ir.Value]:
    """The two inputs of a node, the one for which ``holds`` first."""
    first, second = node.inputs[:2]
    assert first is not None and second is not None
    if holds(second):
        return second, first
    if holds(first) and node.op_type != "MatMul":
        return first, second
    raise NotRotatable(f"the inputs of a {node.op_type} are not as expected")


def _is_look_up(node: ir.Node, is_weight: IsWeight) -> bool:
    """Whether a node looks up the embeddings of the input."""
    inputs = list(node.inputs) if node.op_type == "Gather" else []
    return len(inputs) == 2 and _is(inputs[0], is_weight) and inputs[1] is not None and inputs[1].name == "input_ids"


def _is(value: ir.Value | None, is_weight: IsWeight) -> bool:
    return value is not None and is_weight(value)


def _is_scalar(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and constant.size == 1


def _numbers(value: ir.Value | None) -> list[int]:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    if constant is None:
        raise NotRotatable("a layer is cut at places that are no constants")
    return [int(number) for number in constant.numpy().flatten()]


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape.dims)  # type: ignore[arg-type]
