"""Choose which layers keep their precision, so that a quantised bundle stays within a budget of losses.

The budget limits the losses of tokens per forward and of quality, and says how far the bundle must agree with the
unquantised one on given text. Layers are ranked by how many predictions on block
states flip if only that layer is quantised; the worst layers are kept first. Bisection on stand-ins finds how many
layers to keep. That choice is built and decoded, and more layers are kept if the bundle exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.quantization import GOOD_AGREEMENT
from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.search.measured import Losses
from cllm_export.calibration.search.sensitivity import LayerSensitivity
from cllm_export.checks import OptionGroup, check_share, option
from cllm_export.errors import CalibrationError

DEFAULT_TPF_LOSS = 0.03
DEFAULT_PERPLEXITY_RISE = 0.05


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
    min_agreement: float = option(
        GOOD_AGREEMENT,
        help="Smallest share of the tokens of given texts for which the fp32 bundle's token must be predicted.",
        otherwise=f"{GOOD_AGREEMENT:.0%}",
    )
    max_perplexity_rise: float = option(
        DEFAULT_PERPLEXITY_RISE,
        help="Largest share by which the perplexity on general text may rise.",
        otherwise=f"{DEFAULT_PERPLEXITY_RISE:.0%}",
    )
    min_same_text: float | None = option(
        None, help="Smallest share of prompts whose text must equal that of the fp32 bundle."
    )
    max_quality_loss: float | None = option(
        None,
        help="Largest share of the score that may be lost; where no answer is right, equal texts are the score.",
    )
    """None if the quality of texts does not matter."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if share is not None:
                check_share(name, share, f"{share:g}")

    def holds(self, losses: Losses) -> bool:
        return all(limit.holds for limit in self.limits(losses))

    def limits(self, losses: Losses) -> list[Limit]:
        """Every limit beside what a bundle has, those of this budget that are not None."""
        measured = {
            "max_tpf_loss": ("the loss of tokens per forward", losses.tpf),
            "min_agreement": ("the agreement", losses.agreement),
            "max_perplexity_rise": ("the rise of the perplexity", losses.perplexity),
            "min_same_text": ("the share of equal texts", losses.same_text),
            "max_quality_loss": ("the loss of quality", losses.quality.loss),
        }
        return [
            Limit(name, what, getattr(self, name), value)
            for name, (what, value) in measured.items()
            if getattr(self, name) is not None
        ]


class Limit(NamedTuple):
    """One limit of a budget, and what a bundle has."""

    option: str
    what: str
    bound: float
    value: float

    @property
    def is_least(self) -> bool:
        """Whether the value must not be below the bound. Else it must not be above."""
        return self.option.startswith("min_")

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.is_least else self.value <= self.bound


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
        return {"num_kept": self.num_kept, **self.losses.to_dict(), "measured_on": self.measured_on}


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
            **self.losses.to_dict(),
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
    """Every limit that no bundle kept beside the best that one had, or all limits if each was kept by some bundle."""
    by_limit = list(zip(*(budget.limits(losses) for losses in tried), strict=True))
    missed = [tries for tries in by_limit if not any(limit.holds for limit in tries)] or by_limit
    parts = []
    for tries in missed:
        first = tries[0]
        best = (max if first.is_least else min)(limit.value for limit in tries)
        parts.append(
            f"{first.what} {'at least' if first.is_least else 'within'} {first.bound:.1%}: "
            f"the {'most' if first.is_least else 'least'} was {best:.1%}"
        )
    options = " or ".join(tries[0].option for tries in missed)
    return (
        f"no choice of layers keeps {'; nor '.join(parts)}; allow more with {options}, measure on more prompts, or "
        "choose another scheme"
    )


def _more(num_kept: int, total: int) -> int:
    """How many layers to keep if ``num_kept`` were too few: twice as many, but all except one before all."""
    return total if num_kept >= total - 1 else min(2 * num_kept, total - 1)


def _fewest(ranked: Sequence[LayerSensitivity], ranking: Ranking, budget: Budget, trials: list[Trial]) -> int:
    """The fewest layers to keep so that a stand-in stays within the budget, by bisection."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        losses = ranking.losses([entry.layer.name for entry in ranked[:middle]])
        trials.append(Trial(num_kept=middle, losses=losses, measured_on="stand-in"))
        low, high = (low, middle) if budget.holds(losses) else (middle + 1, high)
    return min(low, len(ranked) - 1)
