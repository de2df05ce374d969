"""The options of quantisation. They are checked before torch is imported."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from cllm_export.bundle.quantization import (
    ENGINE_TITLES,
    ENGINES,
    SCHEME_NAMES,
    SCHEME_SPECS,
    Engine,
    GraphForm,
    SchemeName,
    SchemeOption,
    SchemeSpec,
    schemes_that_take,
)
from cllm_export.checks import OptionGroup, check_options, check_share, option
from cllm_export.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class SchemeOptions:
    """Options that only some schemes take."""

    GROUP: ClassVar[OptionGroup] = "Quantisation"

    group_size: int | None = option(
        None,
        help="For int4: how many input channels share a scale: 32, or with --quantize-for tensorrt 64 or 128 too.",
        minimum=1,
    )
    """Number of input channels that share a scale of a weight; by default the first of the form's sizes."""
    engine: Engine | None = option(
        None,
        help="For int4: the engine that runs the graph.",
        otherwise="onnxruntime",
        choices=ENGINES,
        flag="--quantize-for",
    )
    """Engine that will run the graph. Only int4 takes it, with one graph form per engine; by default ONNX Runtime."""
    scales: Path | None = option(
        None, help="The scales file that `calibrate` wrote. int8 and fp8 need it; int4 uses GPTQ with it."
    )
    """File of a calibration. int8 and fp8 need one; with one, int4 is rounded by GPTQ; int8-dynamic takes none."""
    rotate: bool = option(
        False,
        help="For int8-dynamic: rotate the model first, and round activations to 8 bits instead of 14: faster blocks.",
        flag="--rotate",
    )
    """Rotate the residual stream and the values, so that no channel is far above the others. The rows of layers that
    read them then take 8 bits. A model whose residual stream cannot be rotated is refused."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions(SchemeOptions):
    """The options of a scheme, and the choice of layers: all options except the scheme's name."""

    GROUP: ClassVar[OptionGroup] = "Quantisation"

    head: bool = option(False, help="Quantise the head (lm_head) too.", flag="--quantize-head")
    """Quantise the head too."""
    keep: tuple[str, ...] = option(
        (), help="Do not quantise the linear layer of this checkpoint tensor; repeat the option for several."
    )
    """Checkpoint tensors whose layers keep their precision."""
    min_agreement: float | None = option(
        None,
        help="Refuse a bundle that predicts the model's own token for a smaller share of general text, such as 90%.",
        otherwise="25% for int4, else 50%",
    )
    """Smallest share of the tokens of general text for which the bundle must predict the model's own token. By default
    it is the scheme's, below which nothing of the model is left."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(LayerOptions):
    """How linear layers are quantised.

    Raises:
        OptionError: the scheme is unknown, lacks an option that it needs, or got one that it does not take.
    """

    GROUP: ClassVar[OptionGroup] = "Quantisation"

    scheme: SchemeName = option(
        help="How linear layers store their weights and take their activations.",
        choices=SCHEME_NAMES,
        hidden=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.min_agreement is not None:
            check_share("min_agreement", self.min_agreement, f"{self.min_agreement:g}")
        if self.group_size is not None:
            require_takers("group_size", self.group_size, (self.scheme,))
            self._require_group_size(self.group_size)
        if self.spec.scales == "needed" and self.scales is None:
            raise OptionError(
                f"scheme='{self.scheme}' needs scales: make them with cllm-export calibrate on the unquantised bundle",
                fields=("scales",),
            )
        if self.scales is not None and not self.spec.takes("scales"):
            takers = " and ".join(schemes_that_take("scales"))
            raise OptionError(
                f"scheme='{self.scheme}' takes no scales: they are for {takers}; leave them out", fields=("scales",)
            )
        if self.engine is not None and not self.spec.takes("engine"):
            raise OptionError(
                f"engine is for {' and '.join(schemes_that_take('engine'))}: {self.scheme} is {self._engines_text()}; "
                "leave it out",
                fields=("engine",),
            )
        if self.rotate:
            require_takers("rotate", self.rotate, (self.scheme,))

    def _require_group_size(self, group_size: int) -> None:
        sizes = self.form.group_sizes
        if group_size not in sizes:
            known = f"one of {', '.join(map(str, sizes))}" if len(sizes) > 1 else str(sizes[0])
            raise OptionError(
                f"group_size must be {known} for {ENGINE_TITLES[self.form.engines[0]]}, got {group_size}",
                fields=("group_size",),
            )

    def _engines_text(self) -> str:
        engines = self.spec.forms[0].engines
        return "one graph for both engines" if len(engines) > 1 else f"for {ENGINE_TITLES[engines[0]]} alone"

    @property
    def spec(self) -> SchemeSpec:
        return SCHEME_SPECS[self.scheme]

    @property
    def form(self) -> GraphForm:
        """The form of the graph that will be made."""
        form = self.spec.form(self.engine)
        assert form is not None
        return form

    @property
    def settled_group_size(self) -> int | None:
        """Number of input channels that share a scale; None if the scheme has no groups."""
        return self.group_size or next(iter(self.form.group_sizes), None)


def quantize_options(scheme: SchemeName | None, layers: LayerOptions) -> QuantizeOptions | None:
    """The options of a scheme; None if nothing is quantised.

    Raises:
        OptionError: a quantisation option was given without a scheme, or is out of range.
    """
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, **vars(layers))
    names = ("head", "group_size", "keep", "scales", "engine", "min_agreement", "rotate")
    if used := next((name for name in names if getattr(layers, name) != getattr(LayerOptions, name)), None):
        takers = next((schemes_that_take(name) for name in get_args(SchemeOption) if name == used), SCHEME_NAMES)
        raise OptionError(f"{used} needs a precision that quantises: {', '.join(takers)}", fields=(used, "precision"))
    return None


def require_takers(name: SchemeOption, given: object, schemes: Collection[SchemeName]) -> None:
    """Raise OptionError unless at least one of the schemes takes the given option."""
    takers = schemes_that_take(name)
    if not set(takers) & set(schemes):
        got = "it" if given is True else given
        raise OptionError(
            f"{name} is for {' and '.join(takers)}, got {got} with {', '.join(schemes)}: leave it out", fields=(name,)
        )
