"""Decodes prompts and keeps what each went through, one range of prompts after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cllm_export.bundle.manifest import FillName, Loop
from cllm_export.calibration.recording import Recording, recording_of
from cllm_export.errors import PromptError
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP
from cllm_export.runtime.decoding.sampling import MAX_SEED
from cllm_export.runtime.model import Model


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How prompts are decoded."""

    loop: Loop
    fill: FillName
    block_size: int
    max_new_tokens: int
    seed: int = 0
    """Of fills; each prompt's own comes of it and of its number."""


def record(
    model: Model,
    prompts: Sequence[Prompt],
    options: RecordOptions,
    *,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Recording]:
    """Decode prompts by the chosen loop. One that is empty, too long or does not tokenise is left out.

    Args:
        first: number of the first of them in its file.
        progress: called with the number of prompts that are done.

    Raises:
        EngineError: the engine failed.
        OptionError: the block size does not suit the model.
    """
    recordings = []
    for index, prompt in enumerate(prompts):
        with suppress(PromptError):
            recordings.append(_record(model, prompt, options, first + index))
        if progress:
            progress(index + 1)
    return recordings


def _record(model: Model, prompt: Prompt, options: RecordOptions, number: int) -> Recording:
    ids = model.encode(prompt.content)
    generation = model.generate(
        ids,
        method=METHOD_OF_LOOP[options.loop],
        block_size=options.block_size,
        fill=options.fill,
        seed=(options.seed + number) % MAX_SEED,
        max_new_tokens=min(options.max_new_tokens, max(1, model.facts.max_length - len(ids))),
    )
    return recording_of(prompt.id, ids, generation.forwards)
