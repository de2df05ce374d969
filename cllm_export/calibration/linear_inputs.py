"""The linear layers of a bundle's graph: which value each layer reads, and which checkpoint tensors form its weight.

This module knows how the exporter names weights: ``NAME`` as stored, ``NAME.T`` transposed, and
``...qkv_proj.weight`` for the three projections of an attention, packed into one matrix. Layers that read the same
value share one ``LinearInput``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cllm_export.errors import GraphError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_TRANSPOSED, _PACKED = ".T", ".qkv_proj.weight"
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """One MatMul or Gemm with a weight."""

    weight: str
    """Name of the graph's initializer."""
    tensors: tuple[str, ...]
    """The checkpoint tensors that form the weight, concatenated along the output."""
    rows: str
    """Name of the value that the layer reads, [B, n, in] or [B n, in]."""
    transposed: bool
    """Whether the weight is stored [out, in], as Gemm(transB=1) takes it."""
    shape: tuple[int, int]
    """Shape of the weight as stored."""

    @property
    def width(self) -> int:
        """Input channels."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def name(self) -> str:
        """Name of the layer in reports."""
        return self.weight if self.transposed else self.weight.removesuffix(_TRANSPOSED)

    @property
    def is_head(self) -> bool:
        """Whether the layer computes the logits, with its own matrix or with the embedding table."""
        return not set(self.tensors).isdisjoint(HEADS)


@dataclass(frozen=True, kw_only=True)
class LinearInput:
    """One value that linear layers read."""

    rows: tuple[str, ...]
    """Names of the value in the graph. All of them hold the same numbers."""
    tensors: tuple[str, ...]
    width: int

    @property
    def name(self) -> str:
        """Name of its statistics: the first of its tensors."""
        return self.tensors[0]


def linear_layers(model: ModelProto) -> list[LinearLayer]:
    """Every linear layer of a graph, in graph order.

    Raises:
        GraphError: the graph has no linear layer; it is already quantised, or this project did not export it.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    layers = [
        _layer_of(node, shapes[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and len(shapes.get(node.input[1], ())) == 2
    ]
    if not layers:
        raise GraphError("the graph has no linear layer in full precision: calibrate the bundle that is not quantised")
    return layers


def linear_inputs(model: ModelProto, layers: Iterable[LinearLayer]) -> list[LinearInput]:
    """The inputs of linear layers, each once. The output of a Reshape counts as its input."""
    reshaped = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    found: dict[tuple[str, int], list[LinearLayer]] = {}
    for layer in layers:
        found.setdefault((reshaped.get(layer.rows, layer.rows), layer.width), []).append(layer)
    return [
        LinearInput(
            rows=tuple(dict.fromkeys(layer.rows for layer in group)),
            tensors=tuple(tensor for layer in group for tensor in layer.tensors),
            width=width,
        )
        for (_, width), group in found.items()
    ]


def _layer_of(node: NodeProto, shape: tuple[int, int]) -> LinearLayer:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    name = node.input[1]
    return LinearLayer(
        weight=name,
        tensors=checkpoint_tensors(name, stored=transposed),
        rows=node.input[0],
        transposed=transposed,
        shape=shape,
    )


def checkpoint_tensors(weight: str, *, stored: bool = False) -> tuple[str, ...]:
    """Checkpoint names of the tensors that form a weight of a graph.

    Args:
        stored: whether the weight is the checkpoint's tensor unchanged, whatever its name.
    """
    if stored:
        return (weight,)
    if weight.endswith(_TRANSPOSED):
        return (weight.removesuffix(_TRANSPOSED),)
    if weight.endswith(_PACKED):
        attention = weight.removesuffix(_PACKED)
        return tuple(f"{attention}.{projection}.weight" for projection in _PROJECTIONS)
    return (weight,)
