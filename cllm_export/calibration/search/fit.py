"""Which layers keep their precision so that a quantised bundle loses no more than it may: tokens per forward, quality.

Layers are kept in the order in which quantising them alone flips predictions on block states. How many of them is found
on stand-ins, by bisection; what holds there is built and decoded, and more are kept if it does not hold there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cllm_export.bundle.manifest import Bundle
from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.search.measured import Losses
from cllm_export.calibration.search.sensitivity import LayerSensitivity
from cllm_export.checks import option
from cllm_export.errors import CalibrationError, OptionError

DEFAULT_TPF_LOSS = 0.03


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be lost at most.

    Raises:
        OptionError: a share that is none.
    """

    max_tpf_loss: float = option(
        DEFAULT_TPF_LOSS,
        help="Largest share of the tokens per forward that may be lost, such as 1%; "
        f"by default {DEFAULT_TPF_LOSS:.0%}.",
    )
    max_quality_loss: float | None = option(
        None,
        help="Largest share of the score that may be lost; without answers, the score is the share of equal texts.",
    )
    """None where texts may be whatever they are."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if share is not None and not 0 <= share < 1:
                raise OptionError(f"{name} must be from 0% to below 100%, such as 3%, got {share:g}", fields=(name,))

    def holds(self, losses: Losses) -> bool:
        return losses.tpf <= self.max_tpf_loss and (
            self.max_quality_loss is None or losses.quality <= self.max_quality_loss
        )


class Ranking(Protocol):
    """What can be tried before a bundle is built."""

    layers: list[LinearLayer]

    def rank(self) -> list[LayerSensitivity]:
        """Layers, the one that costs most first."""
        ...

    def losses(self, keep: Sequence[str]) -> Losses:
        """What is lost with all layers but these quantised."""
        ...


class Builder(Protocol):
    """Builds a quantised bundle."""

    def __call__(self, keep: tuple[str, ...]) -> Bundle:
        """The bundle with these checkpoint tensors in full precision."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How many layers were kept, and what was lost."""

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
    """What was chosen, and what it was chosen from."""

    bundle: Bundle
    kept: tuple[LayerSensitivity, ...]
    ranking: tuple[LayerSensitivity, ...]
    """Empty where the budget held with every layer quantised and nobody asked for it."""
    trials: tuple[Trial, ...]

    @property
    def losses(self) -> Losses:
        """What the bundle loses."""
        return self.trials[-1].losses

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. ``kept`` says of each layer what it would have cost by itself."""
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
        losses_of: what a built bundle loses.
        always_rank: measure every layer even where the budget holds with all of them quantised.

    Raises:
        CalibrationError: the budget does not hold even with all layers but one kept.
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
    """How many layers to keep after so many were too few: twice as many, and all but one before all."""
    return total if num_kept >= total - 1 else min(2 * num_kept, total - 1)


def parse_share(text: str, *, name: str) -> float:
    """``3%`` or ``0.03`` as a share; ``name`` is the option's.

    Raises:
        OptionError: it is neither.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise OptionError(f"{name} must be a share such as 3% or 0.03, got {text!r}", fields=(name,)) from None
    if not 0 <= share < 1:
        raise OptionError(f"{name} must be from 0% to below 100%, got {text!r}", fields=(name,))
    return share


def _fewest(ranked: Sequence[LayerSensitivity], ranking: Ranking, budget: Budget, trials: list[Trial]) -> int:
    """Layers to keep until a stand-in holds the budget, by bisection."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        losses = ranking.losses([entry.layer.name for entry in ranked[:middle]])
        trials.append(Trial(num_kept=middle, losses=losses, measured_on="stand-in"))
        low, high = (low, middle) if budget.holds(losses) else (middle + 1, high)
    return min(low, len(ranked) - 1)
