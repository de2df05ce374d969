"""Find remarkable ranges in the statistics: channels far above the others, and dead channels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cllm_export.bundle.scales import InputStatistics

TOWERING = 20.0
"""A channel is an outlier if its range is at least this many times that of the median channel.

With one scale for all channels, such an outlier leaves the median channel fewer than 13 of 255 steps."""
LARGEST_FP16 = 65504.0


def outliers(inputs: Iterable[InputStatistics]) -> list[dict[str, Any]]:
    """Inputs with outlying, overflowing or dead channels, the worst first. JSON-ready.

    ``ratio`` is the range of the largest channel divided by that of the median channel. ``overflows_fp16`` says whether
    half precision cannot hold it. ``high_share`` is the largest channel's robust range divided by its full range. It is
    well below 1 if few rows cause the outlier; clipping would then remove it.
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
