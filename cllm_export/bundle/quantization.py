"""What a quantised bundle is made of: the names of the schemes, and the record that its manifest keeps.

How weights become integers is ``exporter/graph/rounding.py``, what becomes of the graph
``exporter/quantize/rewrite.py``. A scheme
says how linear layers store their weights and take their activations; ``Precision`` still is the dtype of everything
else, the KV cache among it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cllm_export.bundle.contract import PRECISIONS, Precision
from cllm_export.errors import OptionError

Scheme = Literal["int8-dynamic", "int8", "int4", "fp8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
UNQUANTISED = "fp32"
"""What a report calls the bundle that quantised ones are judged by."""
PrecisionName = Literal["fp32", "fp16", "bf16", "int8-dynamic", "int8", "int4", "fp8"]
"""What the command line takes as a precision: a dtype, or a scheme over fp32."""

GROUP_SIZES = (32, 64, 128)
"""Input channels that may share a scale of a 4-bit weight."""

MAX_PAIR = 128
"""What the magnitudes of two neighbouring integers may come to. x86 processors without VNNI multiply an unsigned by a
signed byte and add two such products in 16 bits, where more saturates without a word: 255 * 128 fits, 255 * 129 does
not."""
PAIRED = 4
"""Input channels of which kernels pair any two: they take so many at a time, from the first on."""
BELOW_PAIR = 1 - 2.0**-12
"""Share of ``MAX_PAIR`` that two magnitudes are scaled to, that an error of the division rounds neither too far up."""

Engine = Literal["onnxruntime", "tensorrt"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What was quantised, how, and what was not and why."""

    scheme: Scheme
    method: str
    """How weights were rounded."""
    group_size: int | None
    """Input channels that share a scale of the weights; None where a whole output channel does."""
    engines: tuple[Engine, ...]
    """Engines that the graph is for: operators of one are not always known to the other."""
    weights: tuple[str, ...]
    """Quantised weights, named as in the unquantised graph."""
    kept: dict[str, str]
    """Weight that keeps its precision -> reason."""
    scales_sha256: str | None = None
    """Of the calibration's file, where one was used."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES or not self.engines or not set(self.engines) <= set(ENGINES):
            raise ValueError(f"quantization of scheme {self.scheme!r} for engines {self.engines!r} is unknown")
        if not self.weights:
            raise ValueError("a quantised bundle needs a quantised weight")
        if set(self.weights) & set(self.kept):
            raise ValueError(f"{sorted(set(self.weights) & set(self.kept))[0]} is both quantised and kept")


def split_precision(name: PrecisionName, compute: Precision | None = None) -> tuple[Precision, Scheme | None]:
    """The dtype and the scheme that a precision and ``compute`` stand for.

    Raises:
        OptionError: both name a dtype.
    """
    dtype = next((precision for precision in PRECISIONS if precision == name), None)
    if dtype is None:
        return compute or "fp32", next(scheme for scheme in SCHEMES if scheme == name)
    if compute is not None:
        raise OptionError(
            f"compute is for {', '.join(SCHEMES)}, got it with precision='{name}', which says it already",
            fields=("compute",),
        )
    return dtype, None
