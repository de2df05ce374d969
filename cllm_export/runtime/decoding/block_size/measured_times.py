"""T(n) out of many rounds of measurement: in order, with its spread, and a word where the machine was too busy to tell.

Numbers alone: no clock and no engine. A forward of more tokens does all the work of one of fewer. So a T(n) below that
of a smaller n is noise, and neither of the two is to be trusted alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

MAX_SPREAD = 0.3
"""Distance of the quartiles of T(n) / T(1), as a share of their median, from which on a verdict would be chance. On an
idle machine it is a few per cent."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes:
    """What the rounds of one engine say. A round times every block size once."""

    seconds: dict[int, float]
    """T(n) in seconds by n, in order of n. It never falls."""
    quartiles: dict[int, tuple[float, float]]
    """Lower and upper quartile of T(n) / T(smallest n), each ratio taken within one round."""

    def relative(self, size: int) -> float:
        """T(n) / T(smallest n): at least 1."""
        return self.seconds[size] / min(self.seconds.values())

    def spread(self, size: int) -> float:
        """Distance of the quartiles as a share of their middle."""
        low, high = self.quartiles[size]
        return (high - low) / ((high + low) / 2)

    @property
    def why_busy(self) -> str | None:
        """Why these times decide nothing, or None where they do."""
        size = max(self.quartiles, key=self.spread)
        if self.spread(size) <= MAX_SPREAD:
            return None
        low, high = self.quartiles[size]
        return (
            "the machine is too busy to tell: end other work on it, and run this again "
            f"(half of the measured T({size}) / T({min(self.seconds)}) lie outside {low:.2f} to {high:.2f})"
        )


def settle_times(samples: Mapping[int, Sequence[float]]) -> MeasuredTimes:
    """The times of one engine from its rounds.

    Args:
        samples: seconds of a forward by block size, a value for each round, at least one.
    """
    first = min(samples)
    ratios = {
        size: [each / base for each, base in zip(samples[size], samples[first], strict=True)]
        for size in sorted(samples)
    }
    unit = median(samples[first])
    seconds = monotone({size: unit * median(found) for size, found in ratios.items()})
    return MeasuredTimes(seconds=seconds, quartiles={size: _quartiles(found) for size, found in ratios.items()})


def monotone(times: Mapping[int, float]) -> dict[int, float]:
    """The nearest times that never fall with n, in the order of ``times``: isotonic regression by least squares.

    Neighbours in the wrong order get their mean.
    """
    pools: list[tuple[float, list[int]]] = []
    for size in sorted(times):
        mean, sizes = times[size], [size]
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean = (before * len(others) + mean * len(sizes)) / (len(others) + len(sizes))
            sizes = others + sizes
        pools.append((mean, sizes))
    settled = {size: mean for mean, sizes in pools for size in sizes}
    return {size: settled[size] for size in times}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
