"""The interface of a quantisation scheme in the exporter: it replaces layers, sets their tolerance, and emulates them.

Each scheme is one object in its own file; ``schemes.py`` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from cllm_export.bundle.quantization import SCHEME_SPECS, Engine, SchemeName, SchemeSpec
from cllm_export.bundle.scales import Scales
from cllm_export.exporter.graph.groups import restored
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import Rounding
from cllm_export.exporter.quantize.linear import Linear

ROUND_TO_NEAREST = "round to nearest"

ColumnMaximum = Callable[[str], Tensor]
"""Gives the largest magnitude [in] of each column of a checkpoint tensor, by its name."""


class Constants(Protocol):
    """A graph that constants can be added to. Equal names share one constant."""

    def add_scalar(self, name: str, number: np.generic) -> ir.Value: ...

    def add_constant(self, values: list[int]) -> ir.Value:
        """Add an int64 constant."""
        ...


class FakeConstants(Constants, Protocol):
    """The constants of an fp32 graph, which may also be fp32 arrays."""

    def add_values(self, name: str, values: NDArray[np.float32]) -> ir.Value: ...


class LayerQuantizer(Protocol):
    """Replaces linear layers by quantised ones, by one scheme."""

    @property
    def method(self) -> str:
        """The name of the rounding method in the manifest."""
        ...

    def replace(self, linear: Linear) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a graph that a scheme replaces, and the data it may use."""

    graph: DecoderGraph
    chosen: Sequence[Linear]
    head: Set[str]
    """The names of those of the head."""
    engines: tuple[Engine, ...]
    """The engines that will run the graph."""
    group_size: int | None
    """None if the scheme has no groups."""
    scales: Scales | None
    """The scales of a calibration, with statistics of every chosen layer; None if none were given."""
    column_maximum: ColumnMaximum


class FakeLayer(NamedTuple):
    """The weight and the nodes with which one layer of an fp32 graph emulates its quantised form."""

    weight: Tensor
    """[out, in], fp32: the values that codes and scales represent. A factor that a scheme folds into the scales, the
    nodes make up for."""
    nodes: list[ir.Node]
    """Nodes to insert before the layer; the last one gives the rows, rounded by the scheme. Empty if the scheme does
    not round rows."""


@dataclass(frozen=True, kw_only=True)
class FakeInput:
    """A layer of an fp32 graph that has to emulate its quantised form."""

    constants: FakeConstants
    name: str
    """A name prefix that is unique in the graph."""
    rows: ir.Value
    """The input of the layer, [B, n, in] or [B h, in]."""
    weight: Tensor
    """[out, in], fp32; not changed."""
    group_size: int | None
    engine: Engine | None
    """The engine whose form is emulated; None for the scheme's default."""
    amax: Tensor | None
    """[in]: the largest magnitude of each channel of the rows in a calibration; None without a calibration."""
    spread: bool = False
    """Whether a rotation mixed the channels of the rows, so that none is far above the others."""

    def rounded(self, rounding: Rounding) -> Tensor:
        """The weight after rounding, converted back to fp32."""
        return restored(rounding(self.weight.clone()), self.weight.shape[1])


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """One way to quantise linear layers. Its ``spec`` holds the facts that are needed before torch is imported."""

    name: SchemeName
    min_agreement: float
    """Smallest accepted share of the tokens of general text for which a bundle predicts the model's own token, unless
    the build says another. In tiny random models, whose margins are small, a fifth of the tokens differ in sound 8-bit
    bundles, and more than half in 4-bit bundles. With a broken layer almost all differ."""
    unjudged: frozenset[str] = frozenset()
    """Operators of its graphs that TensorRT does not know. The lint skips them in a graph that is not for TensorRT."""
    reads_gram: bool = False
    """Whether rounding uses the Gram matrix of each layer's input, if there are scales."""

    @property
    def spec(self) -> SchemeSpec:
        return SCHEME_SPECS[self.name]

    @abstractmethod
    def quantizer(self, layers: Layers) -> LayerQuantizer:
        """The object that replaces the chosen layers of a graph.

        Raises:
            QuantizationError: a layer cannot be quantised.
        """

    @abstractmethod
    def fake(self, layer: FakeInput) -> FakeLayer:
        """The emulation of a layer in an fp32 graph: it rounds the weight and the rows in the same way."""
