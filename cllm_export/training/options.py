"""The options of ``cllm-export tune``, and the combinations that it refuses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from cllm_export.bundle.manifest import LOOPS, PROPOSERS, Loop, ProposerName, TrainedWith
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import OptionError
from cllm_export.training import MIXED_PRECISIONS, OBJECTIVES, OPTIMIZERS, MixedPrecision, Objective, OptimizerName
from cllm_export.training.model.options import LoraOptions

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How a checkpoint is tuned.

    Raises:
        OptionError: an option is out of its range, or conflicts with another one.
    """

    GROUP: ClassVar[OptionGroup] = "Training"

    objective: Objective = option(
        "packed",
        help="The training objective; autoregressive is ordinary fine-tuning, for comparison.",
        choices=OBJECTIVES,
        group="Objective",
    )
    """How many noisy states of each sample a forward trains. ``packed``: several; ``global``: one; ``local``: one,
    trained towards the next state; ``autoregressive``: none, which is ordinary fine-tuning."""
    block_sizes: tuple[int, ...] = option(
        (16,),
        help="Block size n, in tokens. Repeat the option to mix several; the first is deployed.",
        minimum=2,
        flag="--block-size",
        group="Objective",
    )
    """n of the training states. The tuned checkpoint records the first as the n it was trained with."""
    loop: Loop = option(
        "sliding", help="The loop that the tuned model will decode with.", choices=LOOPS, group="Objective"
    )
    proposer: ProposerName = option(
        "pad", help="The proposer that the tuned model will decode with.", choices=PROPOSERS, group="Objective"
    )
    steps: int | None = option(None, help="Number of optimiser steps; give either this or --minutes.", minimum=1)
    """Optimiser steps. A resumed run repeats exactly."""
    minutes: float | None = option(
        None, help="Minutes of training, without held-out decoding; give either this or --steps.", above=0
    )
    """Minutes of training, held-out decoding excluded. Replaces ``steps``."""
    batch_size: int = option(32, help="Number of samples in a forward, for each process.", minimum=1)
    """Samples in a forward, for each process."""
    gradient_accumulation: int = option(1, help="Number of forwards in an optimiser step.", minimum=1)
    """Forwards in an optimiser step. The step uses the mean of their gradients; each forward averages over its own
    tokens."""
    num_windows: int = option(
        6,
        help="Number of noisy states of each sample in a forward, for the packed objective.",
        minimum=1,
        group="Objective",
    )
    """States of each sample in a forward, for the packed objective."""
    autoregressive_weight: float = option(
        1.0,
        help="Weight of the autoregressive loss beside the consistency loss; with too little, models collapse.",
        minimum=0,
        group="Objective",
    )
    """Weight of the autoregressive loss, added to the consistency loss. With too little of it, models collapse."""
    distance_weight: float = option(
        1.0,
        help="Factor on a guess's weight for each place that it stands behind the first wrong one.",
        minimum=0,
        maximum=1,
        group="Objective",
    )
    """A guess d places after the first wrong one has weight ``distance_weight ** d``. Below 1, near guesses count
    more."""
    label_smoothing: float = option(
        0.0, help="Label smoothing of the autoregressive loss.", minimum=0, maximum=1, group="Objective"
    )
    optimizer: OptimizerName = option("adamw", help="The optimiser; muon is for small models.", choices=OPTIMIZERS)
    learning_rate: float = option(2e-5, help="Peak learning rate of adamw.", minimum=0)
    matrix_learning_rate: float = option(0.02, help="Peak learning rate of muon, which trains the matrices.", minimum=0)
    """Peak learning rate of Muon."""
    weight_decay: float = option(0.01, help="Weight decay of the optimiser.", minimum=0, hidden=True)
    decay: float = option(
        0.6,
        help="Share of the run, at its end, over which the learning rate falls to zero.",
        minimum=0,
        maximum=1,
    )
    """The learning rate falls to zero over this last share of the run."""
    max_gradient_norm: float = option(1.0, help="Norm that gradients are clipped to.", above=0, hidden=True)
    mixed_precision: MixedPrecision = option(
        "no", help="The dtype of mixed precision, as in accelerate.", choices=MIXED_PRECISIONS
    )
    lora: LoraOptions | None = None
    gradient_checkpointing: bool = option(
        False, help="Compute activations again in the backward pass: less memory, a third more time."
    )
    max_length: int | None = option(
        None, help="Largest number of tokens of prompt and answer; longer samples are left out.", minimum=2
    )
    """Largest number of tokens of prompt and answer. Longer samples are dropped."""
    evaluate_every: float = option(
        0.1,
        help="Share of the run after which held-out prompts are decoded and the state is saved.",
        above=0,
        maximum=1,
    )
    """Each time this share of the run is done, the held-out set is decoded and the state is saved."""
    held_out_tokens: int = option(
        128, help="Largest number of tokens of a held-out answer that are decoded and compared.", minimum=1
    )
    """Bounds the time of a held-out decode: a parent may make one token a forward, and never end."""
    patience: int | None = option(None, help="Stop after this many held-out decodes without progress.", minimum=1)
    """Stop if tokens per forward did not improve by one per cent in this many held-out decodes in a row."""
    seed: int = option(0, help="Seed of the order of samples and of their noisy states.", minimum=0, maximum=MAX_SEED)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.block_sizes:
            raise OptionError("block_sizes must name a block size, got none: give at least one of 2 or more")
        if (self.steps is None) == (self.minutes is None):
            raise OptionError(
                f"give either steps or minutes, {'not both' if self.steps else 'which say how long to train'}",
                fields=("steps", "minutes"),
            )
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise OptionError(
                "optimizer='muon' does not go with mixed_precision='fp16', whose loss scaling serves one optimiser: "
                "use bf16, or adamw"
            )

    @property
    def claim(self) -> TrainedWith | None:
        """What the tuned checkpoint records as trained with. None for ordinary fine-tuning, which trains no block."""
        return None if self.objective == "autoregressive" else self.trained_with

    @property
    def visits(self) -> int:
        """Forwards for which a sample stays in training, each from other states of its windows."""
        return 1 if self.objective == "autoregressive" else 4

    @property
    def trained_with(self) -> TrainedWith:
        return TrainedWith(block_size=self.block_sizes[0], proposer=self.proposer, loop=self.loop)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
