"""Passes that rewrite a decoder's graph step by step until it meets the contract. Each checks its post-condition.

The order matters; ``PASSES`` defines it. A pass works only on the structure, because weights are graph inputs without
data. To change a weight, a pass changes its ``WeightSource``; the change is applied when weights are streamed to disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnxscript import optimizer
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules

from cllm_export.bundle.contract import (
    POSITIONS,
    VISIBLE,
    FixedShapes,
    Geometry,
    TensorSpec,
    graph_inputs,
    graph_outputs,
    hidden_name,
)
from cllm_export.errors import GraphError
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.trace import TRACE_DOMAIN

log = logging.getLogger(__name__)

Pass = Callable[[DecoderGraph], None]

_UNNAMED = re.compile(r"(val|constant)_\d+")
"""Matches names that carry only a running number. The tracer and onnx_ir name unnamed values this way. So does
``_number_constants``, which runs again when a graph is folded again."""


def run_passes(graph: DecoderGraph, passes: Sequence[Pass] | None = None) -> None:
    """Run every pass in order (by default ``PASSES``), and remove unused nodes and weights after each.

    Raises:
        GraphError: a pass did not reach its post-condition; the error names it.
    """
    for step in passes or PASSES:
        step(graph)
        optimizer.remove_unused_nodes(graph.model)
        graph.drop_unused_weights()
        log.debug("%s: %d nodes", step.__name__, len(graph.graph))


def fold_constants(graph: DecoderGraph) -> None:
    """Evaluate values that depend on no input, and simplify the nodes that the tracer wrote."""
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        optimizer.optimize(graph.model, onnx_shape_inference=True)
    finally:
        logging.getLogger("onnxscript").setLevel(level)


def store_offsets(graph: DecoderGraph) -> None:
    """weight + number -> a weight stored with the number added. Gemma's norms scale by 1 + weight."""
    for add in [node for node in graph.graph if node.op_type == "Add"]:
        for value, other in (add.inputs, reversed(add.inputs)):
            weight, number = _behind_cast(value), _number(other)
            if weight is not None and weight.name in graph.weights and number is not None:
                _store_sum(graph, add, value, weight, number)
                break


def _store_sum(graph: DecoderGraph, add: ir.Node, value: ir.Value | None, weight: ir.Value, number: float) -> None:
    """Make readers of ``add`` read a weight that includes the number, cast if ``value`` is a cast of ``weight``."""
    assert value is not None and weight.shape is not None
    source = graph.weights[str(weight.name)]
    shape = tuple(int(dim) for dim in weight.shape.dims)  # type: ignore[arg-type]
    stored = graph.add_weight(
        f"{weight.name}{number:+g}", replace(source, offset=source.offset + number), shape=shape, like=weight
    )
    if value is not weight:
        cast = ir.node("Cast", [stored], {"to": add.outputs[0].dtype})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        graph.graph.insert_before(add, cast)
        stored = cast.outputs[0]
    ir.convenience.replace_all_uses_with(add.outputs[0], stored)


def _number(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _behind_cast(value: ir.Value | None) -> ir.Value | None:
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value


def fuse_rms_norm(graph: DecoderGraph) -> None:
    """Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul -> RMSNormalization. Post: no ReduceMean is left."""
    rewrite(graph.model, pattern_rewrite_rules=pattern.RewriteRuleSet(rms_normalization_rules))
    for norm in [node for node in graph.graph if node.op_type == "RMSNormalization"]:
        _drop_casts(norm)
    _require(graph.count("ReduceMean") == 0, "fuse_rms_norm left a ReduceMean: the model's norm is of an unknown form")


def _drop_casts(norm: ir.Node) -> None:
    """Drop the casts around a half-precision norm: of its scale before it, and of its result after it.

    The operator does both casts itself.
    """
    rows, scale, result = norm.inputs[0], norm.inputs[1], norm.outputs[0]
    narrow = _behind_cast(scale)
    assert rows is not None
    if narrow is None or narrow is scale or narrow.dtype != rows.dtype:
        return
    uses = [use.node for use in result.uses()]
    if all(node.op_type == "Cast" and node.outputs[0].dtype == rows.dtype for node in uses):
        norm.replace_input_with(1, narrow)
        result.type = rows.type
        for node in uses:
            ir.convenience.replace_all_uses_with(node.outputs[0], result)


class _RotaryRule(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """x * cos + rotate_half(x) * sin -> RotaryEmbedding over the tables."""

    def __init__(self) -> None:
        super().__init__(name="RotaryEmbedding", remove_nodes=False)  # cos and sin are shared by every layer

    def pattern(
        self, op: Any, x: Any, cos_table: Any, sin_table: Any, positions: Any, low: Any, half: Any, end: Any
    ) -> Any:
        cos = op.Unsqueeze(op.Rotary(cos_table, positions, _domain=TRACE_DOMAIN), [1])
        sin = op.Unsqueeze(op.Rotary(sin_table, positions, _domain=TRACE_DOMAIN), [1])
        first = op.Slice(x, low, half, [3], [1])
        second = op.Slice(x, half, end, [3], [1])
        return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin

    def check(self, context: Any, x: Any, cos_table: Any, low: Any, half: Any, end: Any, **_: Any) -> Any:
        result = pattern.MatchResult()
        width, rotated = x.shape[3], 2 * cos_table.shape[1]
        bounds = [int(value.const_value.numpy().item()) for value in (low, half, end)]
        if width != rotated or bounds[:2] != [0, width // 2] or bounds[2] < width:
            return result.fail(f"rotation of {rotated} of {width} columns split at {bounds}", x)
        return result

    def rewrite(self, op: Any, x: Any, cos_table: Any, sin_table: Any, positions: Any, **_: Any) -> Any:
        return op.RotaryEmbedding(x, cos_table, sin_table, positions, interleaved=0)


def fuse_rotary(graph: DecoderGraph) -> None:
    """Marker operators and the rotation around them -> RotaryEmbedding.

    Post: one RotaryEmbedding for each use of a marker's cos and sin, at least one in total, and no marker. Some layers
    may have no rotation, or rotate only some of the columns.
    """
    expected = sum(_num_rotations(node) for node in graph.graph if _is_marker(node, "Rotary")) // 2
    rewrite(graph.model, pattern_rewrite_rules=pattern.RewriteRuleSet([_RotaryRule.rule()]))
    optimizer.remove_unused_nodes(graph.model)
    found, markers = graph.count("RotaryEmbedding"), sum(_is_marker(node, "Rotary") for node in graph.graph)
    _require(
        found == expected > 0 and not markers,
        f"fuse_rotary made {found} RotaryEmbedding of {expected} rotations and left {markers} markers",
    )


def _is_marker(node: ir.Node, kind: str) -> bool:
    return node.domain == TRACE_DOMAIN and node.op_type == kind


def _num_rotations(marker: ir.Node) -> int:
    """The number of products that read a marker's output through an Unsqueeze."""
    return sum(len(use.node.outputs[0].uses()) for use in marker.outputs[0].uses())


def make_reshapes_static(graph: DecoderGraph) -> None:
    """Make each Reshape's target constant, with 0 for a kept axis. A target that is another value's shape stays."""
    for node in graph.graph:
        if node.op_type == "Reshape" and _computes_target(node):
            target = _static_target(node)
            node.replace_input_with(1, _constant(graph, target))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def transpose_weights(graph: DecoderGraph) -> None:
    """Transpose(weight) -> a weight stored transposed, or a Gemm if the table is shared. Post: no such Transpose."""
    stored = set(graph.weights)
    transposes = [node for node in graph.graph if node.op_type == "Transpose"]
    for node in [node for node in transposes if node.inputs[0] is not None and node.inputs[0].name in stored]:
        weight = node.inputs[0]
        assert weight is not None and weight.name is not None and weight.shape is not None
        if len(weight.uses()) > 1:
            _use_gemm(graph, node, weight)
            continue
        source = replace(graph.weights[weight.name], transposed=True)
        shape = tuple(int(dim) for dim in reversed(weight.shape.dims))  # type: ignore[arg-type]
        transposed = graph.add_weight(f"{weight.name}.T", source, shape=shape, like=weight)
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
    optimizer.remove_unused_nodes(graph.model)
    sources = [node.inputs[0] for node in graph.graph if node.op_type == "Transpose"]
    left = [value.name for value in sources if value is not None and value.name in stored]
    _require(not left, f"transpose_weights left {left} to be transposed at run time")


def pack_qkv(graph: DecoderGraph) -> None:
    """The three projections of each attention -> one MatMul, one Reshape and one Split by heads.

    On a model of a few million parameters the node count determines the cost of a forward
    (benchmarks/graph_passes.py). Gate and up are not packed: that would save a MatMul but add a Split that copies, so
    the count would stay the same.
    """
    for attention in [node for node in graph.graph if node.op_type == "Attention"]:
        chains = [_projection_of(graph, attention.inputs[index]) for index in (0, 1, 2)]
        if all(chains) and len({chain[0].inputs[0] for chain in chains if chain}) == 1:
            _pack(graph, [chain for chain in chains if chain])


def fold_query_groups(graph: DecoderGraph) -> None:
    """Grouped queries: make the g heads that share a key/value head rows of one head, [B, K, g n, D].

    The computation has the same numbers in the same order, but reads every key and value once instead of g times.
    Without this pass a one-token forward of the demo model (g = 3) is about a tenth slower
    (benchmarks/graph_passes.py).
    """
    folded: dict[tuple[ir.Value, int], ir.Value] = {}
    for attention in [node for node in graph.graph if node.op_type == "Attention"]:
        query, key, _, mask = attention.inputs[:4]
        assert query is not None and key is not None and mask is not None and query.shape and key.shape
        heads, kv_heads, width = (int(dim) for dim in (query.shape[1], key.shape[1], query.shape[3]))  # type: ignore[arg-type]
        groups = heads // kv_heads
        if groups == 1:
            continue
        if (mask, groups) not in folded:
            folded[mask, groups] = _repeat_rows(graph, mask, groups)
        rows = ir.node("Reshape", [query, _constant(graph, [0, kv_heads, -1, width])])
        back = ir.node("Reshape", [attention.outputs[0], _constant(graph, [0, heads, -1, width])])
        back.outputs[0].shape, back.outputs[0].type = attention.outputs[0].shape, attention.outputs[0].type
        attention.outputs[0].shape = None
        ir.convenience.replace_all_uses_with(attention.outputs[0], back.outputs[0])
        back.replace_input_with(0, attention.outputs[0])
        attention.replace_input_with(0, rows.outputs[0])
        attention.replace_input_with(3, folded[mask, groups])
        graph.graph.insert_before(attention, rows)
        graph.graph.insert_after(attention, back)


def name_replaceable_values(graph: DecoderGraph) -> None:
    """Replace the markers of positions and of the causal mask by names, which a variant of the graph looks up.

    Post: at most one value of each has the name, and no marker is left. A graph with a window has several masks and
    names none.
    """
    for kind, name in (("Positions", POSITIONS), ("Visible", VISIBLE)):
        markers = [node for node in graph.graph if _is_marker(node, kind)]
        _require(len(markers) <= 1, f"name_replaceable_values found {len(markers)} {kind} markers")
        for marker in markers:
            _unmark(marker, name)
    optimizer.remove_unused_nodes(graph.model)


def name_hidden_states(graph: DecoderGraph) -> None:
    """Replace the markers between layers by names: ``hidden.0`` enters the first layer, ``hidden.L`` leaves the last.

    With these names a tool can split the graph at its layers. Post: L + 1 names for L layers, and no marker left.
    """
    markers = [node for node in graph.graph if _is_marker(node, "Hidden")]
    for index, marker in enumerate(markers):
        _unmark(marker, hidden_name(index))
    optimizer.remove_unused_nodes(graph.model)
    layers = graph.count("TensorScatter") // 2
    _require(len(markers) == layers + 1, f"name_hidden_states found {len(markers)} markers for {layers} layers")
    graph.model.opset_imports.pop(TRACE_DOMAIN, None)


def _unmark(marker: ir.Node, name: str) -> None:
    """Make readers of a marker read the marked value, and give the value this name."""
    value = marker.inputs[0]
    assert value is not None
    ir.convenience.replace_all_uses_with(marker.outputs[0], value)
    value.name = name


PASSES: tuple[Pass, ...] = (
    fold_constants,
    store_offsets,
    fuse_rms_norm,
    fuse_rotary,
    make_reshapes_static,
    transpose_weights,
    pack_qkv,
    fold_query_groups,
    name_replaceable_values,
    name_hidden_states,
)


def state_contract(
    graph: DecoderGraph,
    geometry: Geometry,
    fixed: FixedShapes | None = None,
    *,
    inputs: Sequence[TensorSpec] | None = None,
) -> None:
    """Give inputs and outputs the shapes of the contract. Drop the tracer's shapes and names of all values between.

    ``inputs`` are the inputs of a variant of the graph; the default is those of the greedy graph.
    """
    inputs = inputs or graph_inputs(geometry, graph.precision, fixed)
    specs = {spec.name: spec for spec in (*inputs, *graph_outputs(geometry, graph.precision, fixed))}
    kept = {POSITIONS, VISIBLE, *(hidden_name(index) for index in range(geometry.num_layers + 1))}
    for index, node in enumerate(graph.graph):
        node.name, node.doc_string = f"{node.op_type}_{index}", None
        node.metadata_props.clear()
        for position, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value.name in specs:
                continue
            if value.name not in kept:
                value.name = f"{node.name}_{position}"
            value.shape, value.type = None, None
    _number_constants(graph.graph)
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if spec := specs.get(str(value.name)):
            value.shape = ir.Shape(spec.shape)
    graph.model.metadata_props.clear()


def _number_constants(graph: ir.Graph) -> None:
    """Number the unnamed constants of the tracer and the passes in the order in which nodes first read them."""
    unnamed = {name: value for name, value in graph.initializers.items() if _UNNAMED.fullmatch(name)}
    read = dict.fromkeys(value for node in graph for value in node.inputs if value in set(unnamed.values()))
    for name in unnamed:
        del graph.initializers[name]
    for index, value in enumerate(read):
        value.name = f"constant_{index}"
        graph.register_initializer(value)


def pin_shapes(graph: DecoderGraph, geometry: Geometry, fixed: FixedShapes) -> None:
    """Make B, n and S fixed numbers. Every Shape is folded, and a Slice that keeps the whole cache is removed."""
    state_contract(graph, geometry, fixed)
    fold_constants(graph)
    if fixed.kv_length == geometry.cache_length:
        for node in [node for node in graph.graph if _is_whole_cache_slice(node)]:
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
    optimizer.remove_unused_nodes(graph.model)
    graph.drop_unused_weights()
    state_contract(graph, geometry, fixed)
    _require(graph.count("Shape") == 0, "pin_shapes left a Shape")


def _is_whole_cache_slice(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
    return source is not None and source.op_type == "TensorScatter"


def _computes_target(reshape: ir.Node) -> bool:
    target = reshape.inputs[1]
    producer = target.producer() if target is not None else None
    return producer is not None and producer.op_type != "Shape"


def _static_target(node: ir.Node) -> list[int]:
    source, result = node.inputs[0], node.outputs[0]
    _require(
        source is not None and source.shape is not None and result.shape is not None,
        f"make_reshapes_static: {node.name} has no known shape",
    )
    assert source is not None and source.shape is not None and result.shape is not None
    target = []
    for axis, dim in enumerate(result.shape.dims):
        kept = axis < len(source.shape) and source.shape[axis] == dim
        target.append(dim if isinstance(dim, int) else 0 if kept else -1)
    _require(target.count(-1) <= 1, f"make_reshapes_static: {node.name} has more than one unknown axis: {result.shape}")
    return target


def _use_gemm(graph: DecoderGraph, transpose: ir.Node, table: ir.Value) -> None:
    """MatMul of rows [B h, E] with a transposed shared table [V, E] -> Gemm(transB). The file then holds it once."""
    for matmul in [use.node for use in transpose.outputs[0].uses()]:
        rows = matmul.inputs[0]
        _require(
            matmul.op_type == "MatMul" and rows is not None and rows.shape is not None and len(rows.shape) == 2,
            f"{table.name} is shared by a {matmul.op_type} that is no head",
        )
        gemm = ir.node("Gemm", [rows, table], {"transB": 1})
        gemm.outputs[0].shape, gemm.outputs[0].type = matmul.outputs[0].shape, matmul.outputs[0].type
        graph.graph.insert_before(matmul, gemm)
        ir.convenience.replace_all_uses_with(matmul.outputs[0], gemm.outputs[0])


def _projection_of(graph: DecoderGraph, value: ir.Value | None) -> list[ir.Node] | None:
    """The nodes from MatMul to Reshape behind an Attention input, plus a Transpose that follows directly; or None."""
    chain: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        chain.insert(0, node)
        if node.op_type == "MatMul":
            break
        value = _data_input(graph, node)
    types = [node.op_type for node in chain]
    for head in (["MatMul", "Reshape"], ["MatMul", "Add", "Reshape"]):
        if types[: len(head)] == head and all(len(node.outputs[0].uses()) == 1 for node in chain[: len(head)]):
            follows = types[len(head)] == "Transpose"
            return chain[: len(head) + follows]
    return None


def _data_input(graph: DecoderGraph, node: ir.Node) -> ir.Value | None:
    """The input of a node that carries activations: the block of a TensorScatter, else the first non-weight input."""
    if node.op_type == "TensorScatter":
        return node.inputs[1]
    return next((value for value in node.inputs if value is not None and value.name not in graph.weights), None)


def _pack(graph: DecoderGraph, chains: list[list[ir.Node]]) -> None:
    first = chains[0][0]
    heads, width = zip(*(_heads(chain) for chain in chains), strict=True)
    weights = [chain[0].inputs[1] for chain in chains]
    rows, packed = first.inputs[0], _packed(graph, weights, axis=1)
    nodes = [ir.node("MatMul", [rows, packed])]
    biases = [_bias(graph, chain) for chain in chains]
    if any(biases):
        _require(all(biases), "pack_qkv: some of the three projections have a bias and some have none")
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], _packed(graph, biases, axis=0)]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], _constant(graph, [0, 0, sum(heads), width[0]])]))
    transposed = all(chain[-1].op_type == "Transpose" for chain in chains)
    if transposed:
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}))
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], _constant(graph, list(heads))],
        {"axis": 1 if transposed else 2},
        num_outputs=3,
    )
    graph.graph.insert_before(first, [*nodes, split])
    for chain, output in zip(chains, split.outputs, strict=True):
        replaced = chain[-1] if transposed else next(node for node in chain if node.op_type == "Reshape")
        output.shape, output.type = replaced.outputs[0].shape, replaced.outputs[0].type
        ir.convenience.replace_all_uses_with(replaced.outputs[0], output)


def _repeat_rows(graph: DecoderGraph, mask: ir.Value, times: int) -> ir.Value:
    """A mask [B, 1, n, S] repeated along its rows: [B, 1, times n, S]."""
    producer = mask.producer()
    assert producer is not None
    repeat = ir.node("Concat", [mask] * times, {"axis": 2})
    graph.graph.insert_after(producer, repeat)
    return repeat.outputs[0]


def _heads(chain: list[ir.Node]) -> tuple[int, int]:
    shape = next(node for node in chain if node.op_type == "Reshape").outputs[0].shape
    assert shape is not None
    return int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def _bias(graph: DecoderGraph, chain: list[ir.Node]) -> ir.Value | None:
    add = next((node for node in chain if node.op_type == "Add"), None)
    return next(value for value in add.inputs if value and value.name in graph.weights) if add else None


def _packed(graph: DecoderGraph, values: list[ir.Value | None], *, axis: int) -> ir.Value:
    """One weight that joins several along their output axis (the first axis in checkpoints)."""
    present = [value for value in values if value is not None and value.shape is not None]
    sources = [graph.weights[str(value.name)] for value in present]
    tensors = tuple(name for source in sources for name in source.tensors)
    dims = [[int(dim) for dim in value.shape.dims] for value in present if value.shape]  # type: ignore[arg-type]
    shape = [*dims[0]]
    shape[axis] = sum(dim[axis] for dim in dims)
    layer, kind = tensors[0].rsplit(".", 2)[0], tensors[0].rsplit(".", 1)[1]
    _require(len({source.offset for source in sources}) == 1, f"{layer}: weights of several offsets cannot be packed")
    source = replace(sources[0], tensors=tensors)
    return graph.add_weight(f"{layer}.qkv_proj.{kind}", source, shape=tuple(shape), like=present[0])


def _constant(graph: DecoderGraph, values: list[int]) -> ir.Value:
    return graph.add_constant(values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)
