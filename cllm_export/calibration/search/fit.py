"""Choose which layers keep their precision, so that a quantised bundle stays within a budget of losses.

The budget limits the losses of tokens per forward and of quality. Layers are ranked by how many predictions on block
states flip if only that layer is quantised; the worst layers are kept first. Bisection on stand-ins finds how many
layers to keep. That choice is built and decoded, and more layers are kept if the bundle exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from cllm_export.bundle.manifest import Bundle
from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.search.measured import Losses
from cllm_export.calibration.search.sensitivity import LayerSensitivity
from cllm_export.checks import OptionGroup, option
from cllm_export.errors import CalibrationError, OptionError

DEFAULT_TPF_LOSS = 0.03


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest losses that are allowed.

    Raises:
        OptionError: a value is not a valid share.
    """

    GROUP: ClassVar[OptionGroup] = "Budget"

    max_tpf_loss: float = option(
        DEFAULT_TPF_LOSS,
        help="Largest share of the tokens per forward that may be lost, such as 1%.",
        otherwise=f"{DEFAULT_TPF_LOSS:.0%}",
    )
    max_quality_loss: float | None = option(
        None,
        help="Largest share of the score that may be lost; without answers, the score is the share of equal texts.",
    )
    """None if the quality of texts does not matter."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if share is not None and not 0 <= share < 1:
                raise OptionError(f"{name} must be from 0% to below 100%, such as 3%, got {share:g}", fields=(name,))

    def holds(self, losses: Losses) -> bool:
        return losses.tpf <= self.max_tpf_loss and (
            self.max_quality_loss is None or losses.quality <= self.max_quality_loss
        )


class Ranking(Protocol):
    """Measurements that are possible before a bundle is built."""

    layers: list[LinearLayer]

    def rank(self) -> list[LayerSensitivity]:
        """Layers, the most costly first."""
        ...

    def losses(self, keep: Sequence[str]) -> Losses:
        """The losses if all layers except these are quantised."""
        ...


class Builder(Protocol):
    """Builds a quantised bundle."""

    def __call__(self, keep: tuple[str, ...]) -> Bundle:
        """Build the bundle with these checkpoint tensors in full precision."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The number of kept layers, and the measured losses."""

    num_kept: int
    losses: Losses
    measured_on: Literal["bundle", "stand-in"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "num_kept": self.num_kept,
            "tpf_loss": self.losses.tpf,
            "quality_loss": self.losses.quality,
            "measured_on": self.measured_on,
        }


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The chosen bundle, and the trials that led to it."""

    bundle: Bundle
    kept: tuple[LayerSensitivity, ...]
    ranking: tuple[LayerSensitivity, ...]
    """Empty if the budget held with every layer quantised and ``always_rank`` was not set."""
    trials: tuple[Trial, ...]

    @property
    def losses(self) -> Losses:
        """The losses of the bundle."""
        return self.trials[-1].losses

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. ``kept`` gives, for each kept layer, what quantising only that layer costs."""
        return {
            "tpf_loss": self.losses.tpf,
            "quality_loss": self.losses.quality,
            "kept": [entry.to_dict() for entry in self.kept],
            "trials": [trial.to_dict() for trial in self.trials],
            "sensitivity": [entry.to_dict() for entry in self.ranking],
        }


def fit(
    ranking: Ranking,
    build: Builder,
    losses_of: Callable[[Bundle], Losses],
    budget: Budget,
    *,
    always_rank: bool = False,
) -> Fit:
    """Build the bundle that keeps as few layers as the budget allows.

    Args:
        losses_of: function that measures the losses of a built bundle.
        always_rank: whether to measure every layer even if the budget holds with all layers quantised.

    Raises:
        CalibrationError: the budget does not hold even if all layers except one are kept.
    """
    bundle = build(())
    trials = [Trial(num_kept=0, losses=losses_of(bundle), measured_on="bundle")]
    holds = budget.holds(trials[0].losses)
    ranked = ranking.rank() if always_rank or not holds else []
    if holds:
        return Fit(bundle=bundle, kept=(), ranking=tuple(ranked), trials=tuple(trials))
    num_kept = max(1, _fewest(ranked, ranking, budget, trials))
    while num_kept < len(ranked):
        kept = ranked[:num_kept]
        bundle = build(tuple(tensor for entry in kept for tensor in entry.layer.tensors))
        trials.append(Trial(num_kept=num_kept, losses=losses_of(bundle), measured_on="bundle"))
        if budget.holds(trials[-1].losses):
            return Fit(bundle=bundle, kept=tuple(kept), ranking=tuple(ranked), trials=tuple(trials))
        num_kept = _more(num_kept, len(ranked))
    tried = [trial.losses for trial in trials if trial.measured_on == "bundle"]
    raise CalibrationError(_unattainable(budget, tried))


def _unattainable(budget: Budget, tried: Sequence[Losses]) -> str:
    allowed = f"the loss of tokens per forward within {budget.max_tpf_loss:.1%}"
    least = f"the least was {min(losses.tpf for losses in tried):.1%}"
    options = "max_tpf_loss"
    if budget.max_quality_loss is not None:
        allowed += f" and that of quality within {budget.max_quality_loss:.1%}"
        least += f" and {min(losses.quality for losses in tried):.1%}"
        options += " or max_quality_loss"
    return (
        f"no choice of layers keeps {allowed}: {least}; allow more with {options}, measure on more prompts, or choose "
        "another scheme"
    )


def _more(num_kept: int, total: int) -> int:
    """How many layers to keep if ``num_kept`` were too few: twice as many, but all except one before all."""
    return total if num_kept >= total - 1 else min(2 * num_kept, total - 1)


def parse_share(text: str, *, name: str) -> float:
    """``3%`` or ``0.03`` as a share; ``name`` is the option's.

    Raises:
        OptionError: the text is not a share.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise OptionError(f"{name} must be a share such as 3% or 0.03, got {text!r}", fields=(name,)) from None
    if not 0 <= share < 1:
        raise OptionError(f"{name} must be from 0% to below 100%, got {text!r}", fields=(name,))
    return share


def _fewest(ranked: Sequence[LayerSensitivity], ranking: Ranking, budget: Budget, trials: list[Trial]) -> int:
    """The fewest layers to keep so that a stand-in stays within the budget, by bisection."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        losses = ranking.losses([entry.layer.name for entry in ranked[:middle]])
        trials.append(Trial(num_kept=middle, losses=losses, measured_on="stand-in"))
        low, high = (low, middle) if budget.holds(losses) else (middle + 1, high)
    return min(low, len(ranked) - 1)
