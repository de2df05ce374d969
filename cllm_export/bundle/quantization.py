"""Quantisation schemes as plain data, and the record of a quantised bundle that its manifest keeps.

A scheme says how linear layers store their weights and take their activations. ``Precision`` remains the dtype of
everything else, including the KV cache. The code that applies a scheme is in ``exporter/quantize/schemes.py``. This
module can be imported without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cllm_export.bundle.contract import PRECISIONS, Precision
from cllm_export.errors import OptionError

SchemeName = Literal["int8-dynamic", "int8", "int4", "fp8"]
SCHEME_NAMES: tuple[SchemeName, ...] = get_args(SchemeName)
UNQUANTISED = "fp32"
"""Name in reports of the bundle that quantised bundles are compared with."""
PrecisionName = Literal[Precision, SchemeName]
"""A precision on the command line: a dtype, or a scheme over fp32."""

GOOD_AGREEMENT = 0.92
"""Share of teacher-forced tokens that a good quantised bundle predicts as the unquantised model does. Below it, more
than half of all texts differ within eight tokens: 0.92 ** 8 is 0.51."""

Engine = Literal["onnxruntime", "tensorrt"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

ENGINE_TITLES: dict[Engine, str] = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}

Rotated = Literal["residual", "values"]
"""What a rotation turns before weights are rounded."""
ROTATED_TITLES: dict[Rotated, str] = {"residual": "residual stream", "values": "values in the KV cache"}


SchemeOption = Literal["scales", "group_size", "engine", "rotate"]
"""Options that only some schemes take."""


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """A graph that a scheme makes: the engines that run it, and the dtypes that its other operators may use."""

    engines: tuple[Engine, ...]
    compute: tuple[Precision, ...] = PRECISIONS
    group_sizes: tuple[int, ...] = ()
    """Allowed numbers of input channels that share a weight scale, the default first. Empty if they all share one."""


@dataclass(frozen=True, kw_only=True)
class SchemeSpec:
    """What a scheme needs and accepts. The options of a build are checked against it."""

    name: SchemeName
    forms: tuple[GraphForm, ...]
    """The graphs that the scheme makes. The first is the default."""
    scales: Literal["needed", "optional", "refused"]
    """Whether the scheme uses the scales of a calibration."""
    rotates: bool = False
    """Whether the model can be rotated first. It helps schemes whose activations have 8 bits."""

    def takes(self, option: SchemeOption) -> bool:
        """Whether the scheme takes an option."""
        taken = {
            "scales": self.scales != "refused",
            "group_size": any(form.group_sizes for form in self.forms),
            "engine": len(self.forms) > 1,
            "rotate": self.rotates,
        }
        return taken[option]

    def form(self, engine: Engine | None) -> GraphForm | None:
        """The graph for an engine, or the default graph. None if the scheme makes no graph for the engine."""
        return next((form for form in self.forms if engine is None or engine in form.engines), None)


ROW_BY_ROW = 32
"""The group size whose 4-bit kernels in ONNX Runtime give a row the same bits, however many rows are beside it. Those
of larger groups add up a last odd row in another way, so rows of one token would differ from those of a block."""

SCHEME_SPECS: dict[SchemeName, SchemeSpec] = {
    spec.name: spec
    for spec in (
        SchemeSpec(
            name="int8-dynamic",
            forms=(GraphForm(engines=("onnxruntime",), compute=("fp32",)),),
            scales="refused",
            rotates=True,
        ),
        SchemeSpec(name="int8", forms=(GraphForm(engines=ENGINES),), scales="needed"),
        SchemeSpec(
            name="int4",
            forms=(
                GraphForm(engines=("onnxruntime",), compute=("fp32",), group_sizes=(ROW_BY_ROW,)),
                GraphForm(engines=("tensorrt",), group_sizes=(32, 64, 128)),
            ),
            scales="optional",
        ),
        SchemeSpec(name="fp8", forms=(GraphForm(engines=ENGINES),), scales="needed"),
    )
}


def schemes_that_take(option: SchemeOption) -> tuple[SchemeName, ...]:
    """The schemes that take an option."""
    return tuple(spec.name for spec in SCHEME_SPECS.values() if spec.takes(option))


def builds_for(engine: Engine) -> str:
    """The build options that give quantised graphs for an engine, as text for an error message."""
    builds = [
        f"precision='{spec.name}'" + ("" if engine in spec.forms[0].engines else f" with engine='{engine}'")
        for spec in SCHEME_SPECS.values()
        if spec.form(engine)
    ]
    return f"{', '.join(builds[:-1])} or {builds[-1]}"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Rows for which two models predict the same token."""

    equal: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.equal <= self.of or self.of < 1:
            raise ValueError(f"{self.equal} of {self.of} rows cannot agree")

    @property
    def share(self) -> float:
        return self.equal / self.of

    def __str__(self) -> str:
        return f"{self.share:.1%} of {self.of:,}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"equal": self.equal, "of": self.of, "share": round(self.share, 6)}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What was quantised and how, and what was not quantised and why."""

    scheme: SchemeName
    method: str
    """The method by which weights were rounded."""
    group_size: int | None
    """Input channels that share a weight scale. None if a whole output channel shares one."""
    engines: tuple[Engine, ...]
    """Engines that can run the graph. Some operators exist in only one engine."""
    weights: tuple[str, ...]
    """Names of the quantised weights, as in the unquantised graph."""
    kept: dict[str, str]
    """Weight that keeps its precision -> reason."""
    scales_sha256: str | None = None
    """sha256 of the calibration's scales file, if one was used."""
    agreement: Agreement | None = None
    """Tokens of general text for which the bundle predicts the model's own token, measured when it was built."""
    rotated: tuple[Rotated, ...] = ()
    """What was rotated before the weights were rounded."""
    unrotated: dict[Rotated, str] = field(default_factory=dict)
    """What could not be rotated without another function -> the reason."""

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
        OptionError: both arguments name a dtype.
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
