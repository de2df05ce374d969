"""Decode prompts, one range after the other, and record every block of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm_export.bundle.manifest import Loop, ProposerName
from cllm_export.calibration.recording import Recording, recording_of
from cllm_export.prompts import Prompt
from cllm_export.runtime.decode_all import decode_all
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP
from cllm_export.runtime.model import Model


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How prompts are decoded."""

    loop: Loop
    proposer: ProposerName
    block_size: int
    max_new_tokens: int
    seed: int = 0
    """Seed of proposers. Each prompt's own seed is derived from it and from the prompt's number."""


def record(
    model: Model,
    prompts: Sequence[Prompt],
    options: RecordOptions,
    *,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Recording]:
    """Decode prompts with the chosen loop. Prompts that are empty, too long or cannot be tokenised are left out.

    Args:
        first: number of the first prompt in its file.
        progress: called with the number of finished prompts.

    Raises:
        EngineError: the engine failed.
        OptionError: the block size does not suit the model.
    """
    decoded = decode_all(
        model,
        [prompt.content for prompt in prompts],
        at_most=options.max_new_tokens,
        first_seed=options.seed + first,
        refused=lambda *_: None,
        progress=progress,
        method=METHOD_OF_LOOP[options.loop],
        block_size=options.block_size,
        proposer=options.proposer,
    )
    return [recording_of(prompts[each.number].id, each.prompt_ids, each.generation.forwards) for each in decoded]
