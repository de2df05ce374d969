"""What quantisation may be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cllm_export.bundle.quantization import ENGINES, GROUP_SIZES, SCHEMES, Engine, Scheme
from cllm_export.checks import check_options, option, require_one_of
from cllm_export.errors import OptionError

DEFAULT_GROUP_SIZE = 32
CALIBRATED: tuple[Scheme, ...] = ("int8", "fp8")
"""Schemes whose activations have scales known before they run."""


@dataclass(frozen=True, kw_only=True)
class SchemeOptions:
    """Options that some schemes have."""

    group_size: int | None = option(
        None, help="For int4: how many input channels share a scale: 32, 64 or 128.", minimum=1
    )
    """Input channels that share a scale of a weight; only where the scheme has groups, 32 by default."""
    engine: Engine | None = option(
        None,
        help="For int4: the engine that runs the graph; by default onnxruntime.",
        choices=ENGINES,
        flag="--quantize-for",
    )
    """Engine that the graph is for, where a scheme has a form for each: int4, by default for ONNX Runtime."""
    scales: Path | None = option(
        None, help="The scales file that `calibrate` wrote. int8 and fp8 need it; int4 uses GPTQ with it."
    )
    """File of a calibration: int8 and fp8 need one, with one int4 is rounded by GPTQ, int8-dynamic takes none."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions(SchemeOptions):
    """Those, and which layers are quantised: all that stands beside a scheme's name."""

    head: bool = option(False, help="Quantise the head (lm_head) too.", flag="--quantize-head")
    """Quantise the head too."""
    keep: tuple[str, ...] = option(
        (), help="Do not quantise the linear layer of this checkpoint tensor; repeat the option for several."
    )
    """Checkpoint tensors whose layers keep their precision."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(LayerOptions):
    """How linear layers are quantised.

    Raises:
        OptionError: the scheme is none, needs an option that is not given, or takes none of one that is.
    """

    scheme: Scheme = option(
        help="How linear layers store their weights and take their activations.",
        choices=SCHEMES,
        hidden=True,
    )

    def __post_init__(self) -> None:
        require_one_of("scheme", self.scheme, SCHEMES)
        check_options(self)
        if self.group_size is not None and (self.scheme != "int4" or self.group_size not in GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise OptionError(f"group_size is for int4 and one of {sizes}, got {self.group_size} for {self.scheme}")
        if self.scheme in CALIBRATED and self.scales is None:
            raise OptionError(
                f"scheme='{self.scheme}' needs scales: make them with cllm-export calibrate on the unquantised bundle",
                fields=("scales",),
            )
        if self.scheme == "int8-dynamic" and self.scales is not None:
            raise OptionError(
                "scheme='int8-dynamic' takes no scales: activations get theirs at run time", fields=("scales",)
            )
        if self.engine is not None and self.scheme != "int4":
            which = "is for ONNX Runtime alone" if self.scheme == "int8-dynamic" else "is one graph for both engines"
            raise OptionError(f"engine is for int4: {self.scheme} {which}; leave it out", fields=("engine",))

    @property
    def is_gptq(self) -> bool:
        return self.scheme == "int4" and self.scales is not None

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines that the graph is for."""
        if self.scheme == "int4":
            return (self.engine or "onnxruntime",)
        return ENGINES if self.scheme in CALIBRATED else ("onnxruntime",)

    @property
    def group(self) -> int | None:
        """The group size, settled."""
        return (self.group_size or DEFAULT_GROUP_SIZE) if self.scheme == "int4" else None


def quantize_options(scheme: Scheme | None, layers: LayerOptions) -> QuantizeOptions | None:
    """Options of a scheme; None where nothing is quantised.

    Raises:
        OptionError: an option of quantisation was given for nothing to quantise, or is out of range.
    """
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, **vars(layers))
    names = ("head", "group_size", "keep", "scales", "engine")
    if used := next((name for name in names if getattr(layers, name)), None):
        raise OptionError(f"{used} needs a precision that quantises: {', '.join(SCHEMES)}", fields=(used, "precision"))
    return None
