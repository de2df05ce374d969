"""Stand-ins for quantised layers: an fp32 graph rounds weights and activations as a scheme does.

Stand-ins allow ranking layers and trying sets of layers in seconds, without building a bundle for each. They use the
exporter's own rounding. A real bundle may compute something else, so every result of a stand-in is measured again on a
bundle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.quantization import SCHEME_NAMES, SCHEME_SPECS, Engine, SchemeName
from cllm_export.bundle.scales import FloatArray, Scales
from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.stored_weights import read_weight
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import CalibrationError
from cllm_export.extras import needs_extra

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto
    from torch import Tensor

    from cllm_export.exporter.graph.rotate import Reader
    from cllm_export.exporter.graph.rotation import RowRotation


@dataclass(frozen=True, kw_only=True)
class FakeQuantization:
    """How a scheme rounds a linear layer.

    Raises:
        CalibrationError: the scheme needs scales, and none are given.
        OptionError: an option is out of its range.
    """

    scheme: SchemeName
    scales: Scales | None = None
    """Source of the scheme's activation scales, if it needs any."""
    group_size: int | None = None
    """Input channels that share a weight scale. The default is the first of the scheme's sizes."""
    rotate: bool = False
    """Whether the model is rotated first."""
    engine: Engine | None = None
    """Engine whose form of the scheme is emulated. The default is that of the scheme's first form."""

    def __post_init__(self) -> None:
        require_one_of("scheme", self.scheme, SCHEME_NAMES)
        if self.group_size is not None:
            require_at_least("group_size", self.group_size, 1)
        if SCHEME_SPECS[self.scheme].scales == "needed" and self.scales is None:
            raise CalibrationError(
                f"{self.scheme} needs scales: make them with cllm-export calibrate, and give them as scales",
                fields=("scales",),
            )

    @property
    def settled_group_size(self) -> int | None:
        """Input channels that share a scale. None if the scheme has no groups."""
        form = SCHEME_SPECS[self.scheme].form(self.engine)
        return self.group_size or next(iter(form.group_sizes if form else ()), None)


def fake_quantized(
    bundle: Bundle, graph: ModelProto, layers: Iterable[LinearLayer], how: FakeQuantization
) -> tuple[ModelProto, dict[str, FloatArray]]:
    """A copy of a bundle's fp32 graph that rounds these layers, and the rounded weights to run it with.

    Where a build rotates the model, the rows of a layer are rotated before they are rounded, and its weight is rounded
    as rotated.

    Raises:
        CalibrationError: the bundle is not fp32, a layer has no scales, or the graph cannot be rotated. The graph of
            linked weights cannot.
    """
    if bundle.manifest.precision != "fp32":
        raise CalibrationError(f"{bundle.path} is {bundle.manifest.precision}; stand-ins need an fp32 bundle")
    with needs_extra("export"):
        import onnx_ir as ir
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    model = ir.serde.deserialize_model(graph)
    readers = {_weight_name(node): node for node in model.graph}
    turns = _Turns(bundle, graph, model.graph if how.rotate else None)
    weights = {}
    for layer in layers:
        stored = read_weight(bundle, initializers[layer.weight])
        matrix = stored if layer.transposed else stored.T  # [out, in]
        rounded = _round_layer(model.graph, readers[layer.weight], layer, matrix, how, turns)
        weights[layer.weight] = np.ascontiguousarray(rounded if layer.transposed else rounded.T)
    return ir.serde.serialize_model(model), weights


def _weight_name(node: ir.Node) -> str | None:
    """Name of the weight of a MatMul or Gemm. None for any other node."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    return weight.name if weight else None


def _round_layer(
    graph: ir.Graph, node: ir.Node, layer: LinearLayer, matrix: FloatArray, how: FakeQuantization, turns: _Turns
) -> FloatArray:
    """Insert nodes that round a layer's input rows before the layer. Return its rounded weight [out, in]."""
    import torch

    from cllm_export.exporter.quantize.scheme import FakeInput
    from cllm_export.exporter.quantize.schemes import SCHEMES

    constants = _Constants(graph)
    rows = node.inputs[0]
    assert rows is not None
    before, turned = turns.turn(layer.weight, rows, torch.tensor(matrix), constants)
    amax = how.scales.of(layer.tensors[0]).amax.copy() if how.scales else None
    fake = SCHEMES[how.scheme].fake(
        FakeInput(
            constants=constants,
            name=f"fake.{layer.weight}",
            rows=before[-1].outputs[0] if before else rows,
            weight=turned,
            group_size=how.settled_group_size,
            engine=how.engine,
            amax=None if amax is None else torch.from_numpy(amax),
            spread=bool(before),
        )
    )
    if nodes := [*before, *fake.nodes]:
        graph.insert_before(node, nodes)
        node.replace_input_with(0, nodes[-1].outputs[0])
    weight: FloatArray = turns.turn_back(layer.weight, fake.weight).numpy()
    return weight


def _not_rotatable(bundle: Bundle, reason: str) -> str:
    if bundle.manifest.linked_weights:
        return (
            f"{bundle.path} links to the weights of its checkpoint, and such a graph cannot be rotated: give a bundle "
            "that was built with weights='copy', or leave rotate out"
        )
    return f"rotate is for models whose residual stream can be rotated, and in {bundle.path} {reason}: leave rotate out"


class _Turns:
    """What a build would rotate before it rounds.

    Args:
        rotated: the graph to find it in; None if nothing is rotated.
    """

    def __init__(self, bundle: Bundle, graph: ModelProto, rotated: ir.Graph | None) -> None:
        self._bundle = bundle
        self._initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
        self._readers: dict[str | None, Reader] = {}
        self._rows: dict[str | None, list[RowRotation]] = {}
        if rotated is None:
            return
        from cllm_export.exporter.graph.rotate import plan_rotation
        from cllm_export.exporter.graph.rotation import RowRotation

        plan = plan_rotation(rotated, self._is_stored)
        if reason := plan.refused.get("residual"):
            raise CalibrationError(_not_rotatable(bundle, reason), fields=("rotate",))
        self._readers = {_weight_name(reader.node): reader for reader in plan.readers}
        for value, rotation, start, stop in plan.writers:
            self._rows.setdefault(value.name, []).append(RowRotation(rotation=rotation, start=start, stop=stop))

    def _is_stored(self, value: ir.Value) -> bool:
        """Whether a value is in a file of weights."""
        tensor = self._initializers.get(str(value.name))
        return tensor is not None and tensor.data_location == tensor.EXTERNAL

    def turn(self, name: str, rows: ir.Value, weight: Tensor, constants: _Constants) -> tuple[list[ir.Node], Tensor]:
        """The nodes that rotate the input of a layer, and its weight [out, in] for that, with a rotated output."""
        import onnx_ir as ir
        import torch

        from cllm_export.exporter.graph.rotation import ColumnRotation

        nodes: list[ir.Node] = []
        if (reader := self._readers.get(name)) is not None:
            scale = self._scale(reader)
            if scale is not None:
                divisor = constants.add_values(f"{name}.scale", torch.where(scale == 0, 1, scale).numpy())
                nodes.append(ir.node("Div", [rows, divisor]))
                rows = nodes[-1].outputs[0]
            width, rotation = weight.shape[1], reader.rotation
            blocks = torch.kron(torch.eye(width // rotation.width), rotation.matrix()).float().numpy()
            turned = constants.add_values(f"rotation.{rotation.width}.{width}", blocks)
            nodes.append(ir.node("MatMul", [rows, turned]))
            weight = ColumnRotation(rotation=rotation, scale=None if scale is None else scale.double())(weight)
        for turn in self._rows.get(name, ()):
            turn.apply(weight, 0)
        return nodes, weight

    def turn_back(self, name: str, weight: Tensor) -> Tensor:
        """A weight whose output is rotated -> the same weight with the output of the graph."""
        for turn in self._rows.get(name, ()):
            turn.apply(weight, 0, inverse=True)
        return weight

    def _scale(self, reader: Reader) -> Tensor | None:
        import torch

        norm = reader.norm.inputs[1] if reader.norm is not None else None
        return None if norm is None else torch.tensor(read_weight(self._bundle, self._initializers[str(norm.name)]))


class _Constants:
    """Adds constants to a graph as initializers. Their names differ from those of all weights of a bundle."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def add_scalar(self, name: str, number: np.generic) -> ir.Value:
        return self._add(name, np.asarray(number))

    def add_constant(self, values: list[int]) -> ir.Value:
        return self._add("_".join(["const", *map(str, values)]), np.asarray(values, np.int64))

    def add_values(self, name: str, values: FloatArray) -> ir.Value:
        return self._add(name, values)

    def _add(self, name: str, values: NDArray[np.generic]) -> ir.Value:
        import onnx_ir as ir

        name = name if name.startswith("fake.") else f"fake.{name}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(values, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]
