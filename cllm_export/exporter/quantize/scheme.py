"""What a quantisation scheme is to the exporter: how layers are replaced, judged, and stood in for.

Each scheme is one object in a file of its own; ``schemes.py`` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from cllm_export.bundle.quantization import SCHEME_SPECS, Engine, SchemeName, SchemeSpec
from cllm_export.bundle.scales import Scales
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.rounding import Rounding, restored
from cllm_export.exporter.quantize.linear import Linear

ROUND_TO_NEAREST = "round to nearest"

ColumnMaximum = Callable[[str], Tensor]
"""Largest magnitude [in] of each column of a checkpoint tensor."""


class Constants(Protocol):
    """A graph that takes constants. Equal names are one constant."""

    def add_scalar(self, name: str, number: np.generic) -> ir.Value: ...

    def add_constant(self, values: list[int]) -> ir.Value:
        """Of int64."""
        ...


class FakeConstants(Constants, Protocol):
    """The constants of an fp32 graph that keeps any of them itself."""

    def add_values(self, name: str, values: NDArray[np.float32]) -> ir.Value: ...


class LayerQuantizer(Protocol):
    """Puts quantised layers in the place of others, by one scheme."""

    @property
    def method(self) -> str:
        """What the manifest calls the way weights are rounded."""
        ...

    def replace(self, linear: Linear) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a graph that a scheme replaces, and what it may know of them."""

    graph: DecoderGraph
    chosen: Sequence[Linear]
    engines: tuple[Engine, ...]
    """Engines that the graph is for."""
    group_size: int | None
    """None where the scheme has no groups."""
    scales: Scales | None
    """Of a calibration, with statistics of every chosen layer; None where none were given."""
    column_maximum: ColumnMaximum


class FakeLayer(NamedTuple):
    """What one layer of an fp32 graph computes with, instead of the quantised layer that it stands for."""

    weight: Tensor
    """[out, in], fp32: what codes and scales stand for."""
    nodes: list[ir.Node]
    """What is put before the layer: the last of them gives its rows as the scheme rounds them. Empty where it rounds
    none."""


@dataclass(frozen=True, kw_only=True)
class FakeInput:
    """A layer of an fp32 graph that is to compute as if it were quantised."""

    constants: FakeConstants
    name: str
    """A prefix of names that nothing else in the graph has."""
    rows: ir.Value
    """What the layer takes, [B, n, in] or [B h, in]."""
    weight: Tensor
    """[out, in], fp32; left as it is."""
    group_size: int | None
    amax: Tensor | None
    """[in]: the largest magnitude of each channel of the rows in a calibration; None where there was none."""

    def rounded(self, rounding: Rounding) -> Tensor:
        """The weight as a rounding stores it, in fp32 again."""
        return restored(rounding(self.weight.clone()), self.weight.shape[1])


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """One way to quantise linear layers. What must be known of it before torch is imported is its ``spec``."""

    name: SchemeName
    max_flips: float
    """Share of greedy tokens that may differ from the unquantised model's on random tokens, where margins are small.
    Sound 8-bit bundles of tiny random models differ in a fifth of them, 4-bit ones in more than half; a broken layer
    leaves next to none alike."""
    unjudged: frozenset[str] = frozenset()
    """Operators of its graphs that TensorRT does not know. The lint passes over them in a graph that is not for it."""
    reads_gram: bool = False
    """Whether it rounds with the Gram matrix of each layer's input, where it has scales."""

    @property
    def spec(self) -> SchemeSpec:
        return SCHEME_SPECS[self.name]

    @abstractmethod
    def quantizer(self, layers: Layers) -> LayerQuantizer:
        """What replaces the chosen layers of a graph.

        Raises:
            QuantizationError: a layer cannot be quantised.
        """

    @abstractmethod
    def fake(self, layer: FakeInput) -> FakeLayer:
        """The stand-in of a layer in an fp32 graph: the same roundings of its weight and of its rows."""
