"""What ``cllm-export tune`` lets the user choose, and what of it makes no sense."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cllm_export.bundle.manifest import FILLS, LOOPS, FillName, Loop, TrainedWith
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.read import Checkpoint, refuse_in_torch
from cllm_export.exporter.options import BuildOptions, Settings, settle
from cllm_export.training import MIXED_PRECISIONS, OBJECTIVES, OPTIMIZERS, MixedPrecision, Objective, OptimizerName
from cllm_export.training.model.lora import LoraOptions

CHOICES = {
    "objective": OBJECTIVES,
    "loop": LOOPS,
    "fill": FILLS,
    "optimizer": OPTIMIZERS,
    "mixed_precision": MIXED_PRECISIONS,
}
COUNTS = ("num_windows", "batch_size", "gradient_accumulation", "steps", "patience")
RATES = ("autoregressive_weight", "weight_decay", "learning_rate", "matrix_learning_rate")
SHARES = ("label_smoothing", "distance_weight", "decay", "evaluate_every")
POSITIVE = ("minutes", "evaluate_every", "max_gradient_norm")
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How a checkpoint is tuned."""

    objective: Objective = "packed"
    """``packed``: many states of each sample in one forward; ``global``: one; ``local``: one, against the state after
    it; ``autoregressive``: none, which is ordinary fine-tuning."""
    block_sizes: tuple[int, ...] = (16,)
    """n of the training states. The first is what the checkpoint says it was trained with."""
    loop: Loop = "sliding"
    fill: FillName = "pad"
    num_windows: int = 6
    """States of a sample in a forward of the packed objective."""
    steps: int | None = None
    """Optimiser steps; resumed runs repeat exactly."""
    minutes: float | None = None
    """Minutes of training, held-out decoding excluded; instead of steps."""
    batch_size: int = 32
    """Samples of a forward, in each process."""
    gradient_accumulation: int = 1
    """Forwards of an optimiser step. Its gradient is the mean of theirs, each a mean over its own tokens."""
    autoregressive_weight: float = 1.0
    """Weight of the autoregressive loss beside the consistency loss: too little of it, and models collapse."""
    distance_weight: float = 1.0
    """What a guess counts for each place that it stands behind the first wrong one: below 1, near ones come first."""
    label_smoothing: float = 0.0
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-5
    matrix_learning_rate: float = 0.02
    """Of muon."""
    weight_decay: float = 0.01
    decay: float = 0.6
    """Share of the run over which the learning rate falls to zero."""
    max_gradient_norm: float = 1.0
    max_length: int | None = None
    """Tokens of prompt and answer; longer samples are left out."""
    mixed_precision: MixedPrecision = "no"
    lora: LoraOptions | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: float = 0.1
    """Share of the run after which the held-out set is decoded again and the state is saved."""
    patience: int | None = None
    """Stop after so many held-out decodes in a row without one per cent more tokens per forward."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            require_one_of(name, getattr(self, name), allowed)
        for name in COUNTS:
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if self.max_length is not None:
            require_at_least("max_length", self.max_length, 2)
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        """Every comparison is written so that NaN fails it."""
        if not self.block_sizes or min(self.block_sizes) < 2:
            raise OptionError(f"block_sizes must be 2 or more each, got {self.block_sizes}")
        for name in (*RATES, *SHARES, *POSITIVE):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"{name} must be a number of 0 or more, got {value}")
        for name in SHARES:
            if getattr(self, name) > 1:
                raise OptionError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        for name in POSITIVE:
            if getattr(self, name) == 0:
                raise OptionError(f"{name} must be more than 0, got 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise OptionError(f"seed must be from 0 to {MAX_SEED}, got {self.seed}")

    def _check_combinations(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise OptionError(f"give either steps or minutes, got {self.steps} and {self.minutes}")
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise OptionError("muon does not go with fp16, whose loss scaling serves one optimiser: use bf16, or adamw")

    @property
    def claim(self) -> TrainedWith | None:
        """What the tuned checkpoint says it was trained with: ordinary fine-tuning trains no block."""
        return None if self.objective == "autoregressive" else self.trained_with

    @property
    def trained_with(self) -> TrainedWith:
        return TrainedWith(block_size=self.block_sizes[0], fill=self.fill, loop=self.loop)

    def settle(self, checkpoint: Checkpoint) -> Settings:
        """What the checkpoint makes of lengths and block size.

        Raises:
            OptionError: they do not fit it.
            UnsupportedError: it cannot be trained at this length, see ``refuse_in_torch``.
        """
        settings = settle(BuildOptions(max_length=self.max_length, trained_with=self.trained_with), checkpoint)
        refuse_in_torch(checkpoint, settings.max_length)
        return settings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
