"""The graph that TensorRT parses: the greedy graph in the form of which its builder makes the fewest kernels.

It has the weights and the contract of the greedy graph. ONNX Runtime can run either, which is how the two are compared
without a GPU. ``benchmarks/plan_kernels.py`` shows what each step is worth, and what else was tried.

The first step undoes ``fold_query_groups``, which makes the heads that share a key/value head rows of one head. ONNX
Runtime gains a tenth by it. In TensorRT the folded form loses the attention kernel of one row, costs seven kernels a
forward, and does not build at all with one key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from cllm_export.bundle.contract import FixedShapes, Geometry
from cllm_export.errors import GraphError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import state_contract

MASK_INPUT = 3
HEAD_AXIS, ROW_AXIS = 1, 1
"""Axis of the heads in keys and values [B, K, S, D], and of the rows in hidden states [B, n, E]."""
TO_THE_END = 2**31 - 1
PRESENT_KEY, PRESENT_VALUE = "present_key.", "present_value."
ROWS = "row_numbers"
NORMS = ("RMSNormalization", "LayerNormalization")

Step = Callable[[DecoderGraph], None]


def derive_tensorrt_graph(
    greedy: DecoderGraph, geometry: Geometry, fixed: FixedShapes | None = None, *, steps: Sequence[Step] | None = None
) -> DecoderGraph:
    """Derive the graph for TensorRT from a finished greedy graph, which stays unchanged.

    ``steps`` are the changes to make, by default all of ``STEPS``.

    Raises:
        GraphError: an attention is folded in a form that this pass does not know.
    """
    graph = greedy.copy()
    for step in STEPS if steps is None else steps:
        step(graph)
        graph.graph.sort()
        optimizer.remove_unused_nodes(graph.model)
    graph.drop_unused_weights()
    state_contract(graph, geometry, fixed)
    return graph


def unfold_query_groups(graph: DecoderGraph) -> None:
    """One row of queries for each head, [B, H, n, D]: the queries and masks from before ``fold_query_groups``."""
    for attention in _nodes(graph, "Attention"):
        rows = _producer(attention.inputs[0], "Reshape")
        if rows is None:
            continue
        repeat, back = _producer(attention.inputs[MASK_INPUT], "Concat"), _readers(attention.outputs[0])
        if repeat is None or len(set(repeat.inputs)) != 1 or [node.op_type for node in back] != ["Reshape"]:
            raise GraphError(f"{attention.name} has no folded query groups, which fold_query_groups makes")
        attention.replace_input_with(0, rows.inputs[0])
        attention.replace_input_with(MASK_INPUT, repeat.inputs[0])
        ir.convenience.replace_all_uses_with(back[0].outputs[0], attention.outputs[0])


def gather_before_norms(graph: DecoderGraph) -> None:
    """Look up the head's rows before the last norms instead of behind them. A norm computes each row by itself.

    Behind the norm, the look-up parts the norm from the product before it. That costs a kernel or two a forward.
    """
    for gather in _nodes(graph, "Gather"):
        norm = _producer(gather.inputs[0], *NORMS)
        if norm is not None:
            rows = _like(graph, norm, _rows_before(graph, norm.inputs[0], gather.inputs[1]))
            ir.convenience.replace_all_uses_with(gather.outputs[0], rows)


def _rows_before(graph: DecoderGraph, value: ir.Value | None, index: ir.Value | None) -> ir.Value:
    """Rows of a value. Where the value is a sum with the result of a norm, rows of the norm's input are looked up."""
    add = _producer(value, "Add")
    norms = [_producer(term, *NORMS) for term in add.inputs] if add else []
    if add is None or not any(norms):
        return _add(graph, "Gather", [value, index], {"axis": ROW_AXIS})
    terms = [
        _add(graph, "Gather", [norm.inputs[0] if norm else term, index], {"axis": ROW_AXIS})
        for term, norm in zip(add.inputs, norms, strict=True)
    ]
    return _like(
        graph, add, *(_like(graph, norm, rows) if norm else rows for rows, norm in zip(terms, norms, strict=True))
    )


def number_rows_on_the_device(graph: DecoderGraph) -> None:
    """n in ``num_accepted`` as the last row number + 1, instead of as the length of an input.

    TensorRT computes lengths on the host. A length that is used as a number is copied to the device in every forward.
    """
    rows = [node for node in _nodes(graph, "Slice") if node.inputs[0] is not None and node.inputs[0].name == ROWS]
    for where in _nodes(graph, "Where"):
        if rows and _producer(where.inputs[1], "Shape") is not None:
            bounds = [graph.add_constant([bound]) for bound in (-1, TO_THE_END, 0)]
            last = _add(graph, "Slice", [rows[0].outputs[0], *bounds])
            where.replace_input_with(1, _add(graph, "Add", [last, graph.add_constant([1])]))


def read_cache_together(graph: DecoderGraph) -> None:
    """Take a layer's keys and values out of the cache through one Concat and one Split: one kernel instead of two.

    TensorRT's attention kernels read packed rows. So rows 0..S-1 of the cache are copied first, in any form. With fixed
    shapes the graph has no Slice, and two kernels would copy each row once for each query head.
    """
    outputs = {str(value.name): value for value in graph.graph.outputs}
    for name in [name for name in outputs if name.startswith(PRESENT_KEY)]:
        caches = outputs[name], outputs[name.replace(PRESENT_KEY, PRESENT_VALUE)]
        read = [_rows_that_are_read(cache) for cache in caches]
        uses = [list(value.uses()) for value in read]
        joined = _add(graph, "Concat", read, {"axis": HEAD_AXIS})
        parts = _split(graph, joined, {"axis": HEAD_AXIS, "num_outputs": len(read)})
        for part, readers in zip(parts, uses, strict=True):
            for use in readers:
                use.node.replace_input_with(use.idx, part)


def _rows_that_are_read(cache: ir.Value) -> ir.Value:
    """Rows 0..S-1 of a cache: the result of its Slice, or the cache itself with fixed shapes."""
    slices = [node.outputs[0] for node in _readers(cache) if node.op_type == "Slice"]
    return slices[0] if slices else cache


def norm_heads_together(graph: DecoderGraph) -> None:
    """Normalise the heads of queries and keys at once, if the model does so: one kernel instead of two.

    The norm gets a scale of ones, and its result is multiplied by each head's own scale. RMSNormalization is defined
    as just this product, in the dtype of the rows.
    """
    for split in _nodes(graph, "Split"):
        norms = [_only_reader(value, "RMSNormalization") for value in split.outputs[:2]]
        query, key = norms if len(norms) == 2 else (None, None)
        if query is not None and key is not None and len(split.outputs) == 3 and _settings(query) == _settings(key):
            _norm_together(graph, split, query, key)


def _norm_together(graph: DecoderGraph, split: ir.Node, query: ir.Node, key: ir.Node) -> None:
    axis = split.attributes["axis"].as_int()
    sizes = ir.convenience.get_const_tensor(split.inputs[1]) if split.inputs[1] is not None else None
    scales = [norm.inputs[1] for norm in (query, key)]
    if sizes is None or any(scale is None or scale.name not in graph.weights for scale in scales):
        return
    heads, kv_heads, _ = (int(size) for size in sizes.numpy())
    width = int(scales[0].shape[0])  # type: ignore[union-attr, index, arg-type]
    both, values = _split(graph, split.inputs[0], {"axis": axis}, [heads + kv_heads, kv_heads])
    normed = _like(graph, query, both, _ones(graph, width))
    per_head = [[count, 1, width] if axis == HEAD_AXIS else [count, width] for count in (heads, kv_heads)]
    expanded = [
        _add(graph, "Expand", [scale, graph.add_constant(shape)]) for scale, shape in zip(scales, per_head, strict=True)
    ]
    scaled = _add(graph, "Mul", [normed, _add(graph, "Concat", expanded, {"axis": 0})])
    parts = _split(graph, scaled, {"axis": axis}, [heads, kv_heads])
    replaced = query.outputs[0], key.outputs[0], split.outputs[2]
    for old, new in zip(replaced, (*parts, values), strict=True):
        ir.convenience.replace_all_uses_with(old, new)


def _ones(graph: DecoderGraph, width: int) -> ir.Value:
    name = f"ones_{width}"
    if name not in graph.graph.initializers:
        tensor = ir.tensor(np.ones(width, graph.dtype.numpy()), name=name)
        kind = ir.TensorType(graph.dtype)
        value = ir.Value(name=name, shape=ir.Shape([width]), type=kind, const_value=tensor)
        graph.graph.register_initializer(value)
    return graph.graph.initializers[name]


STEPS: tuple[Step, ...] = (
    unfold_query_groups,
    gather_before_norms,
    number_rows_on_the_device,
    read_cache_together,
    norm_heads_together,
)


def _nodes(graph: DecoderGraph, op_type: str) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == op_type]


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if it is of one of these types."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type in op_types else None


def _readers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = _readers(value)
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def _settings(norm: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in norm.attributes.items()}


def _like(graph: DecoderGraph, node: ir.Node, *inputs: ir.Value) -> ir.Value:
    """The result of a new node that does what ``node`` does, with other first inputs."""
    attributes = list(node.attributes.values())
    copied = ir.Node(
        node.domain, node.op_type, [*inputs, *node.inputs[len(inputs) :]], attributes, version=node.version
    )
    graph.graph.append(copied)
    return copied.outputs[0]


def _add(
    graph: DecoderGraph, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
) -> ir.Value:
    """The result of a new node. ``derive_tensorrt_graph`` sorts the graph, so its place does not matter."""
    node = ir.node(op_type, inputs, attributes or {})
    graph.graph.append(node)
    return node.outputs[0]


def _split(
    graph: DecoderGraph, value: ir.Value | None, attributes: Mapping[str, Any], sizes: Sequence[int] = ()
) -> Sequence[ir.Value]:
    """The parts of a new Split: of these sizes, or as many of one size as its attribute says."""
    inputs = [value, graph.add_constant(list(sizes))] if sizes else [value]
    node = ir.node("Split", inputs, attributes, num_outputs=len(sizes) or attributes["num_outputs"])
    graph.graph.append(node)
    return node.outputs
