"""Which layers keep their precision so that a quantised bundle loses no more tokens per forward than it may.

Layers are kept in the order in which quantising them alone flips predictions on block states. How many of them is found
on stand-ins, by bisection; what holds there is built and decoded, and more are kept if it does not hold there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cllm_export.bundle import Bundle
from cllm_export.calibration.linear import LinearLayer
from cllm_export.calibration.sensitivity import LayerSensitivity
from cllm_export.errors import CalibrationError, OptionError


class Ranking(Protocol):
    """What can be tried before a bundle is built."""

    layers: list[LinearLayer]

    def rank(self) -> list[LayerSensitivity]:
        """Layers, the one that costs most first."""
        ...

    def loss(self, keep: Sequence[str]) -> float:
        """Share of tokens per forward lost with all layers but these quantised."""
        ...


class Builder(Protocol):
    """Builds a quantised bundle."""

    def __call__(self, keep: tuple[str, ...]) -> Bundle:
        """The bundle with these checkpoint tensors in full precision."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How many layers were kept, and the share of tokens per forward that was lost."""

    num_kept: int
    tpf_loss: float
    measured_on: Literal["bundle", "stand-in"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was chosen, and what it was chosen from."""

    bundle: Bundle
    kept: tuple[LayerSensitivity, ...]
    ranking: tuple[LayerSensitivity, ...]
    """Empty where the budget held with every layer quantised and nobody asked for it."""
    trials: tuple[Trial, ...]
    budget: float

    @property
    def tpf_loss(self) -> float:
        """Share of tokens per forward that the bundle loses."""
        return self.trials[-1].tpf_loss

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. ``kept`` says of each layer what it would have cost by itself."""
        return {
            "budget": self.budget,
            "tpf_loss": self.tpf_loss,
            "kept": [entry.to_dict() for entry in self.kept],
            "trials": [vars(trial) for trial in self.trials],
            "sensitivity": [entry.to_dict() for entry in self.ranking],
        }


def fit(
    ranking: Ranking, build: Builder, loss_of: Callable[[Bundle], float], budget: float, *, always_rank: bool = False
) -> Fit:
    """Build the bundle that keeps as few layers as the budget allows.

    Args:
        loss_of: share of tokens per forward that a built bundle loses.
        budget: the largest that is accepted, 0 to 1.
        always_rank: measure every layer even where the budget holds with all of them quantised.

    Raises:
        CalibrationError: the budget does not hold even with all layers but one kept.
    """
    if not 0 <= budget < 1:
        raise OptionError(f"the budget must be a share from 0 to 1, such as 3%, got {budget:g}")
    bundle = build(())
    trials = [Trial(num_kept=0, tpf_loss=loss_of(bundle), measured_on="bundle")]
    holds = trials[0].tpf_loss <= budget
    ranked = ranking.rank() if always_rank or not holds else []
    if holds:
        return Fit(bundle=bundle, kept=(), ranking=tuple(ranked), trials=tuple(trials), budget=budget)
    num_kept = max(1, _fewest(ranked, ranking, budget, trials))
    while num_kept < len(ranked):
        kept = ranked[:num_kept]
        bundle = build(tuple(tensor for entry in kept for tensor in entry.layer.tensors))
        trials.append(Trial(num_kept=num_kept, tpf_loss=loss_of(bundle), measured_on="bundle"))
        if trials[-1].tpf_loss <= budget:
            return Fit(bundle=bundle, kept=tuple(kept), ranking=tuple(ranked), trials=tuple(trials), budget=budget)
        num_kept = _more(num_kept, len(ranked))
    best = min(trial.tpf_loss for trial in trials if trial.measured_on == "bundle")
    raise CalibrationError(
        f"no choice of layers keeps the loss of tokens per forward within {budget:.1%}: the least was {best:.1%}; "
        "allow more with --max-tpf-loss, measure on more prompts, or choose another --precision"
    )


def _more(num_kept: int, total: int) -> int:
    """How many layers to keep after so many were too few: twice as many, and all but one before all."""
    return total if num_kept >= total - 1 else min(2 * num_kept, total - 1)


def parse_share(text: str) -> float:
    """``3%`` or ``0.03`` as a share.

    Raises:
        OptionError: it is neither.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise OptionError(f"--max-tpf-loss must be a share such as 3% or 0.03, got {text!r}") from None
    if not 0 <= share < 1:
        raise OptionError(f"--max-tpf-loss must be from 0% to below 100%, got {text!r}")
    return share


def _fewest(ranked: Sequence[LayerSensitivity], ranking: Ranking, budget: float, trials: list[Trial]) -> int:
    """Layers to keep until a stand-in holds the budget, by bisection."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        loss = ranking.loss([entry.layer.name for entry in ranked[:middle]])
        trials.append(Trial(num_kept=middle, tpf_loss=loss, measured_on="stand-in"))
        low, high = (low, middle) if loss <= budget else (middle + 1, high)
    return min(low, len(ranked) - 1)
