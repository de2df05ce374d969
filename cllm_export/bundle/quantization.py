"""Quantisation schemes as plain data, and the record of a quantised bundle that its manifest keeps.

A scheme says how linear layers store their weights and take their activations; ``Precision`` still is the dtype of
everything else, the KV cache among it. What the exporter does with a scheme is its object in
``exporter/quantize/schemes.py``; what stands here is known before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cllm_export.bundle.contract import PRECISIONS, Precision
from cllm_export.errors import OptionError

SchemeName = Literal["int8-dynamic", "int8", "int4", "fp8"]
SCHEME_NAMES: tuple[SchemeName, ...] = get_args(SchemeName)
UNQUANTISED = "fp32"
"""What a report calls the bundle that quantised ones are judged by."""
PrecisionName = Literal[Precision, SchemeName]
"""What the command line takes as a precision: a dtype, or a scheme over fp32."""

Engine = Literal["onnxruntime", "tensorrt"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

ENGINE_TITLES: dict[Engine, str] = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}


SchemeOption = Literal["scales", "group_size", "engine"]
"""Options that some schemes take and others do not."""


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """A graph that a scheme makes: the engines that run it, and the dtypes that the rest of it may compute in."""

    engines: tuple[Engine, ...]
    compute: tuple[Precision, ...] = PRECISIONS


@dataclass(frozen=True, kw_only=True)
class SchemeSpec:
    """What the options of a build are checked against: what a scheme needs, and what it takes."""

    name: SchemeName
    forms: tuple[GraphForm, ...]
    """The graphs that it makes; the first is the default."""
    scales: Literal["needed", "optional", "refused"]
    """Whether it takes the scales of a calibration."""
    group_sizes: tuple[int, ...] = ()
    """Input channels that may share a scale of a weight, the default first; empty where all of them do."""

    def takes(self, option: SchemeOption) -> bool:
        """Whether an option is for this scheme."""
        taken = {
            "scales": self.scales != "refused",
            "group_size": bool(self.group_sizes),
            "engine": len(self.forms) > 1,
        }
        return taken[option]

    def form(self, engine: Engine | None) -> GraphForm | None:
        """The graph for an engine, or by default; None where the scheme makes no graph for it."""
        return next((form for form in self.forms if engine is None or engine in form.engines), None)


SCHEME_SPECS: dict[SchemeName, SchemeSpec] = {
    spec.name: spec
    for spec in (
        SchemeSpec(
            name="int8-dynamic",
            forms=(GraphForm(engines=("onnxruntime",), compute=("fp32",)),),
            scales="refused",
        ),
        SchemeSpec(name="int8", forms=(GraphForm(engines=ENGINES),), scales="needed"),
        SchemeSpec(
            name="int4",
            forms=(GraphForm(engines=("onnxruntime",), compute=("fp32",)), GraphForm(engines=("tensorrt",))),
            scales="optional",
            group_sizes=(32, 64, 128),
        ),
        SchemeSpec(name="fp8", forms=(GraphForm(engines=ENGINES),), scales="needed"),
    )
}


def schemes_that_take(option: SchemeOption) -> tuple[SchemeName, ...]:
    """The schemes that an option is for."""
    return tuple(spec.name for spec in SCHEME_SPECS.values() if spec.takes(option))


def builds_for(engine: Engine) -> str:
    """The options of a build whose quantised graphs an engine runs, for a message that gives advice."""
    builds = [
        f"precision='{spec.name}'" + ("" if engine in spec.forms[0].engines else f" with engine='{engine}'")
        for spec in SCHEME_SPECS.values()
        if spec.form(engine)
    ]
    return f"{', '.join(builds[:-1])} or {builds[-1]}"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What was quantised, how, and what was not and why."""

    scheme: SchemeName
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
        if self.scheme not in SCHEME_NAMES or not self.engines or not set(self.engines) <= set(ENGINES):
            raise ValueError(f"quantization of scheme {self.scheme!r} for engines {self.engines!r} is unknown")
        if not self.weights:
            raise ValueError("a quantised bundle needs a quantised weight")
        if set(self.weights) & set(self.kept):
            raise ValueError(f"{sorted(set(self.weights) & set(self.kept))[0]} is both quantised and kept")


def split_precision(name: PrecisionName, compute: Precision | None = None) -> tuple[Precision, SchemeName | None]:
    """The dtype and the scheme that a precision and ``compute`` stand for.

    Raises:
        OptionError: both name a dtype.
    """
    dtype = next((precision for precision in PRECISIONS if precision == name), None)
    if dtype is None:
        return compute or "fp32", next(scheme for scheme in SCHEME_NAMES if scheme == name)
    if compute is not None:
        raise OptionError(
            f"compute is for {', '.join(SCHEME_NAMES)}, got it with precision='{name}', which says it already",
            fields=("compute",),
        )
    return dtype, None
