"""What a build may be told of quantisation. Checked before torch is imported."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

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
from cllm_export.checks import check_options, option
from cllm_export.errors import OptionError

CALIBRATE = "make them with cllm-export calibrate on the unquantised bundle"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What ``cllm-export build`` lets the user choose of quantisation.

    Raises:
        OptionError: an option is out of its range, or not for the scheme.
    """

    scheme: SchemeName = option(
        help="How linear layers are quantised.", choices=SCHEME_NAMES, flag="--precision", hidden=True
    )
    head: bool = option(False, help="Quantise the head too, which by default is kept.", flag="--quantize-head")
    group_size: int | None = option(
        None, help="int4: input channels that share a scale of a weight, 32, 64 or 128.", minimum=1
    )
    """By default the first of the scheme's."""
    keep: tuple[str, ...] = option((), help="Checkpoint tensor of a linear layer that keeps its precision; repeatable.")
    scales: Path | None = option(
        None, help="The file that cllm-export calibrate wrote: int8 and fp8 need it, int4 then takes GPTQ."
    )
    engine: Engine | None = option(
        None, help="int4: the engine of the graph; by default onnxruntime.", choices=ENGINES, flag="--quantize-for"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.group_size is not None:
            require_takers("group_size", self.group_size, (self.scheme,))
            self._require_group_size(self.group_size)
        if self.spec.scales == "needed" and self.scales is None:
            raise OptionError(f"scheme {self.scheme} needs scales: {CALIBRATE}", fields=("scheme", "scales"))
        if self.spec.scales == "refused" and self.scales is not None:
            raise OptionError(
                f"scheme {self.scheme} takes no scales, they are for {_either('scales')}: leave them out",
                fields=("scheme", "scales"),
            )
        if self.engine is not None and not self.spec.takes("engine"):
            engines = self.spec.forms[0].engines
            which = "one graph for both engines" if len(engines) > 1 else f"for {ENGINE_TITLES[engines[0]]} alone"
            raise OptionError(
                f"engine is for {_either('engine')}, got {self.engine}: {self.scheme} is {which}; leave it out",
                fields=("engine",),
            )

    def _require_group_size(self, group_size: int) -> None:
        sizes = self.spec.group_sizes
        if group_size not in sizes:
            known = ", ".join(map(str, sizes))
            raise OptionError(f"group_size must be one of {known}, got {group_size}", fields=("group_size",))

    @property
    def spec(self) -> SchemeSpec:
        return SCHEME_SPECS[self.scheme]

    @property
    def form(self) -> GraphForm:
        """The graph that is made."""
        form = self.spec.form(self.engine)
        assert form is not None
        return form

    @property
    def settled_group_size(self) -> int | None:
        """Input channels that share a scale; None where the scheme has no groups."""
        return self.group_size or next(iter(self.spec.group_sizes), None)


def quantize_options(
    scheme: SchemeName | None,
    *,
    head: bool = False,
    group_size: int | None = None,
    keep: tuple[str, ...] = (),
    scales: Path | None = None,
    engine: Engine | None = None,
) -> QuantizeOptions | None:
    """Options of a scheme; None where nothing is quantised.

    Raises:
        OptionError: an option of quantisation was given for nothing to quantise, or is out of range.
    """
    given = {"head": head, "group_size": group_size, "keep": keep, "scales": scales, "engine": engine}
    if scheme is not None:
        return QuantizeOptions(scheme=scheme, **given)  # type: ignore[arg-type]
    if used := next((name for name, value in given.items() if value), None):
        raise OptionError(
            f"{used} needs a precision that quantises: {', '.join(SCHEME_NAMES)}", fields=(used, "precision")
        )
    return None


def require_takers(name: SchemeOption, given: object, schemes: Collection[SchemeName]) -> None:
    """Raise OptionError unless an option that was given is for one of the schemes."""
    if not set(schemes_that_take(name)) & set(schemes):
        takers = " and ".join(schemes_that_take(name))
        raise OptionError(
            f"{name} is for {takers}, got {given} with {', '.join(schemes)}: leave it out", fields=(name,)
        )


def _either(name: SchemeOption) -> str:
    return " and ".join(schemes_that_take(name))
