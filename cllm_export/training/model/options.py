"""Options of how the model is changed for tuning."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_export.checks import check_options, option


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Size and scale of the adapters.

    Raises:
        OptionError: an option is out of its range.
    """

    rank: int = option(
        help="Train LoRA adapters of this rank, which are merged when the checkpoint is saved.",
        minimum=1,
        flag="--lora-rank",
        group="LoRA",
    )
    alpha: float | None = option(
        None,
        help="Alpha of the LoRA adapters.",
        otherwise="twice the rank",
        above=0,
        flag="--lora-alpha",
        group="LoRA",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def settled_alpha(self) -> float:
        """``alpha``, or twice the rank by default. The product of the adapters is scaled by ``alpha / rank``."""
        return 2 * self.rank if self.alpha is None else self.alpha
