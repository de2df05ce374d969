"""The lookahead graph: the finished greedy graph with other positions and another mask (arXiv 2402.02057).

Nothing is traced again, and no weight is duplicated. Two named values of the greedy graph are computed from two
additional inputs instead. ``contract.py`` explains these inputs.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer
from transformers import PretrainedConfig

from cllm_export.bundle.contract import POSITIONS, VISIBLE, Geometry, TensorSpec, lookahead_inputs
from cllm_export.errors import GraphError
from cllm_export.exporter.checkpoint.families import window_within
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import state_contract

IR_DTYPE = {"int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}


def lookahead_obstacle(config: PretrainedConfig, *, max_length: int) -> str | None:
    """The reason why a model cannot have a lookahead graph; None if it can."""
    if (window := window_within(config, max_length)) is not None:
        return (
            f"its mask knows no window, and layers of this model see {window} tokens of the max length {max_length}: "
            f"build with max_length={window} or less"
        )
    return None


def derive_lookahead(greedy: DecoderGraph, geometry: Geometry) -> DecoderGraph:
    """Derive the lookahead graph from a finished greedy graph, which stays unchanged.

    Raises:
        GraphError: a value that has to be replaced has no name in the greedy graph.
    """
    graph = greedy.copy()
    inputs = lookahead_inputs(geometry, graph.precision)
    values = _add_inputs(graph, inputs)
    positions, visible = _require_value(graph, POSITIONS), _require_value(graph, VISIBLE)
    by_slot = ir.node("Unsqueeze", [values["write_index"], graph.add_constant([1])])
    place = ir.node("Add", [by_slot.outputs[0], values["row_offsets"]])
    graph.graph.insert_before(graph.graph[0], [by_slot, place])
    _replace(positions, place.outputs[0])
    _replace(visible, _insert_visible(graph, values, by_slot))
    optimizer.remove_unused_nodes(graph.model)
    graph.drop_unused_weights()
    state_contract(graph, geometry, inputs=inputs)
    return graph


def _insert_visible(graph: DecoderGraph, values: dict[str, ir.Value], by_slot: ir.Node) -> ir.Value:
    """The cache rows that each row sees [B, 1, n, S]: those below the write index, and the block's by ``row_mask``.

    Cache row s is row s - write_index of the block. Cache rows outside the block look up column 0, and the result is
    then masked out. This avoids a Gather outside its axis, which is invalid. TensorRT has no Clip for integers.
    """
    nodes: list[ir.Node] = []

    def op(name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        nodes.append(ir.node(name, list(inputs), attributes))
        return nodes[-1].outputs[0]

    zero, one = graph.add_constant([0]), graph.add_constant([1])
    length = op("Shape", values["row_offsets"])
    column = op("Sub", values["kv_positions"], by_slot.outputs[0])
    past = op("Less", column, zero)
    in_block = op("And", op("Not", past), op("Less", column, length))
    seen = op("Gather", values["row_mask"], op("Where", in_block, column, zero), axis=1)
    by_row = op("And", op("Transpose", seen, perm=[1, 0, 2]), op("Unsqueeze", in_block, one))
    visible = op("Unsqueeze", op("Or", op("Unsqueeze", past, one), by_row), one)
    graph.graph.insert_after(by_slot, nodes)
    return visible


def _add_inputs(graph: DecoderGraph, specs: list[TensorSpec]) -> dict[str, ir.Value]:
    """Add missing inputs and put all inputs in the order of the contract, weights last. Returns inputs by name."""
    present = {str(value.name): value for value in graph.graph.inputs}
    for spec in specs:
        if spec.name not in present:
            dtype = ir.TensorType(IR_DTYPE[spec.dtype])
            present[spec.name] = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=dtype)
    stated = [spec.name for spec in specs]
    weights = [str(value.name) for value in graph.graph.inputs if str(value.name) not in stated]
    graph.graph.inputs.clear()
    graph.graph.inputs.extend([present[name] for name in (*stated, *weights)])
    return present


def _require_value(graph: DecoderGraph, name: str) -> ir.Value:
    for node in graph.graph:
        for value in node.outputs:
            if value.name == name:
                return value
    raise GraphError(f"the greedy graph has no value named {name!r}, which its lookahead variant replaces")


def _replace(value: ir.Value, new: ir.Value) -> None:
    """Make all readers of a value read another value, which takes over its name."""
    name = value.name
    ir.convenience.replace_all_uses_with(value, new)
    value.name, new.name = f"{name}.replaced", name
    new.shape, new.type = value.shape, value.type
