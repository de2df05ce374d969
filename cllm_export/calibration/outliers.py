"""What is remarkable about the ranges that were seen: channels that tower above the others, and dead ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cllm_export.bundle.scales import InputStatistics

TOWERING = 20.0
"""Times the median channel's range from which a channel counts as an outlier: with one scale for all channels it leaves
the median one fewer than 13 of 255 steps."""
LARGEST_FP16 = 65504.0


def outliers(inputs: Iterable[InputStatistics]) -> list[dict[str, Any]]:
    """Inputs with outlying, overflowing or dead channels, the worst first. JSON-ready.

    ``ratio`` is the largest channel's range over the median one's; ``overflows_fp16`` says whether half precision
    could not hold it; ``high_share`` is the largest channel's robust range over its whole one: well below 1 where few
    rows make the outlier, which clipping would cut.
    """
    found = [entry for each in inputs if (entry := _describe(each))]
    return sorted(found, key=lambda entry: -float(entry["ratio"]))


def _describe(statistics: InputStatistics) -> dict[str, Any] | None:
    alive = statistics.amax[statistics.amax > 0]
    dead = statistics.width - len(alive)
    channel = int(statistics.amax.argmax())
    largest = float(statistics.amax[channel])
    ratio = largest / float(np.median(alive))
    if ratio < TOWERING and largest <= LARGEST_FP16 and not dead:
        return None
    return {
        "input": statistics.name,
        "channel": channel,
        "amax": largest,
        "ratio": ratio,
        "high_share": float(statistics.high[channel]) / largest,
        "overflows_fp16": largest > LARGEST_FP16,
        "dead_channels": dead,
    }
