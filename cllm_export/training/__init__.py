"""Makes Consistency LLMs: trajectories, losses, the tuning loop. Its modules need the extra ``train``.

This module imports nothing from the extra, because the command line reads these choices without it.
"""

from __future__ import annotations

from typing import Literal, get_args

Objective = Literal["packed", "global", "local", "autoregressive"]
OptimizerName = Literal["adamw", "muon"]
MixedPrecision = Literal["no", "bf16", "fp16"]

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
MIXED_PRECISIONS: tuple[MixedPrecision, ...] = get_args(MixedPrecision)
