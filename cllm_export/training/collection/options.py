"""The options of ``cllm-export collect``."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_export.bundle.manifest import ProposerName
from cllm_export.checks import check_options, option
from cllm_export.runtime.decoding.request import JacobiMethod
from cllm_export.runtime.decoding.shared_options import (
    block_size_option,
    limit_option,
    max_new_tokens_option,
    method_option,
    proposer_option,
)


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """The options of ``cllm-export collect``. Method, n and proposer default to those of the model's training.

    Raises:
        OptionError: an option is out of its range.
    """

    method: JacobiMethod | None = method_option()
    block_size: int | None = block_size_option(whose="the model's own")
    proposer: ProposerName | None = proposer_option()
    seed: int = option(
        0, help="Seed of the prompt proposer, from which each prompt gets its own.", minimum=0, group="Decoding"
    )
    max_new_tokens: int | None = max_new_tokens_option(None, otherwise="as many as fit")
    """By default, as many as fit."""
    shard_size: int = option(
        1000, help="Number of prompts in a shard; each shard is saved when it is complete.", minimum=1, group="Output"
    )
    limit: int | None = limit_option()

    def __post_init__(self) -> None:
        check_options(self)
