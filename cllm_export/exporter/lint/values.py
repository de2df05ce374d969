"""Collects facts about the values of a graph: their dtypes, shapes and constants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, shape_inference

Dim = int | str | None
"""The length of an axis: known (int), symbolic (str) or unknown (None)."""

MAX_MESSAGE = 500

MAX_INLINE = 1024
"""Largest constant, in elements, that shape inference sees. Reshape targets and axes stay; weights do not."""

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})

INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})

BOOL = frozenset({TensorProto.BOOL})

QUANTIZED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1})


# Facts about the graph.


@dataclass(frozen=True, kw_only=True)
class Values:
    """Facts about every value, including values of subgraphs. In ONNX their names do not collide."""

    inputs: frozenset[str]
    """Inputs that a caller feeds; initializers are not among them."""
    outputs: frozenset[str]
    readers: Counter[str]
    """Number of times each value is read: by nodes at any depth, and as a graph output."""
    constants: dict[str, tuple[int, ...] | None]
    """Constant -> its integers; None if it holds other data, or if its data is not in the model."""
    producers: dict[str, NodeProto] = field(default_factory=dict)
    """Value -> the node that computes it."""
    dtypes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    """Value -> shape. A value of unknown rank is absent."""

    @classmethod
    def of(cls, model: ModelProto, described: GraphProto) -> Values:
        """Facts about ``model``. Dtypes and shapes come from ``described``, the graph after shape inference."""
        stored = {tensor.name for tensor in model.graph.initializer}
        read = Counter(value.name for graph in graphs_of(model.graph) for value in graph.output)
        read.update(name for node, _ in nodes_of(model.graph) for name in node.input)
        values = cls(
            inputs=frozenset(value.name for value in model.graph.input) - stored,
            outputs=frozenset(value.name for value in model.graph.output),
            readers=read,
            constants=dict(constants(model.graph)),
            producers={name: node for node, _ in nodes_of(model.graph) for name in node.output},
        )
        for graph in graphs_of(described):
            values._describe((*graph.input, *graph.value_info, *graph.output))
            values._describe(_info_of(tensor) for tensor in graph.initializer)
        return values

    def _describe(self, infos: Iterable[ValueInfoProto]) -> None:
        for info in infos:
            tensor = info.type.tensor_type
            self.dtypes[info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[info.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
                )

    def rank(self, name: str) -> int | None:
        return len(self.shapes[name]) if name in self.shapes else None

    def length(self, name: str, axis: int) -> Dim:
        shape = self.shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None


def infer(model: ModelProto) -> tuple[GraphProto, list[tuple[str, str]]]:
    """Infer the shapes of the graph. If that fails, return the unchanged graph and the error as (rule, message).

    Inference first follows the contents of shape vectors (``data_prop``), which gives more shapes. But onnx takes any
    short int64 vector for a shape vector. It then raises even on some valid graphs, such as [B] -> [B, 1] plus [n]. So
    after a failure, inference runs again without it.
    """
    for data_prop in (True, False):
        try:
            return shape_inference.infer_shapes(model, strict_mode=True, data_prop=data_prop).graph, []
        except (shape_inference.InferenceError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split())[:MAX_MESSAGE]
    return model.graph, [("shape-inference", message)]


def _without_data(model: ModelProto) -> ModelProto:
    """A copy in which weights are inputs: shape inference needs the data of any initializer that is an int64 vector."""
    graph = model.graph
    inline = [tensor for tensor in graph.initializer if _is_inline(tensor)]
    fed = {value.name for value in graph.input}
    weights = [_info_of(tensor) for tensor in graph.initializer if not _is_inline(tensor) and tensor.name not in fed]
    copy = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    copy.graph.name = graph.name
    for node in graph.node:
        known, dense = _inferable(node)
        copy.graph.node.append(known)
        weights += dense
    copy.graph.input.extend([*graph.input, *weights])
    copy.graph.output.extend(graph.output)
    copy.graph.value_info.extend(graph.value_info)
    copy.graph.initializer.extend(inline)
    return copy


def _inferable(node: NodeProto) -> tuple[NodeProto, list[ValueInfoProto]]:
    """The node and its extra inputs. MatMulNBits, which shape inference does not know, becomes a MatMul."""
    if node.op_type != "MatMulNBits":
        return node, []
    dense, shape = f"{node.output[0]}.dense", [attribute(node, "K", 0), attribute(node, "N", 0)]
    known = helper.make_node("MatMul", [node.input[0], dense], list(node.output), name=node.name)
    return known, [helper.make_tensor_value_info(dense, TensorProto.FLOAT, shape)]


def _is_inline(tensor: TensorProto) -> bool:
    return bool(tensor.data_location != TensorProto.EXTERNAL) and math.prod(tensor.dims) <= MAX_INLINE


def _info_of(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all subgraphs, at any depth."""
    yield graph
    for node in graph.node:
        for subgraph in subgraphs(node):
            yield from graphs_of(subgraph)


def nodes_of(graph: GraphProto, inside: str = "") -> Iterator[tuple[NodeProto, str]]:
    """Every node, with the type of the operator whose subgraph contains it ("" at the top level)."""
    for node in graph.node:
        yield node, inside
        for subgraph in subgraphs(node):
            yield from nodes_of(subgraph, node.op_type)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from (attribute.g,) if attribute.HasField("g") else attribute.graphs


def constants(graph: GraphProto) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Initializers and outputs of Constant nodes; the parser treats them alike."""
    for scope in graphs_of(graph):
        yield from ((tensor.name, _integers(tensor)) for tensor in scope.initializer)
        for node in scope.node:
            if node.op_type == "Constant" and node.output:
                yield node.output[0], integers_of(node)


def integers_of(constant: NodeProto) -> tuple[int, ...] | None:
    if single := attributes(constant, "value_int"):
        return tuple(single)
    if several := attributes(constant, "value_ints"):
        return tuple(several[0])
    tensors = attributes(constant, "value")
    return _integers(tensors[0]) if tensors else None


def _integers(tensor: TensorProto) -> tuple[int, ...] | None:
    if not _is_inline(tensor) or tensor.data_type not in INTEGERS | {TensorProto.INT8, TensorProto.UINT8}:
        return None
    return tuple(int(value) for value in numpy_helper.to_array(tensor).ravel())


def attributes(node: NodeProto, name: str) -> list[Any]:
    """A list with the value of an attribute; empty if the node does not set it."""
    return [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next(iter(attributes(node, name)), default)


def input_name(node: NodeProto, index: int) -> str:
    """The name of an input; "" if it is absent."""
    name: str = node.input[index] if index < len(node.input) else ""
    return name


def dtype_name(dtype: int) -> str:
    name: str = TensorProto.DataType.Name(dtype)
    return name
