"""Decode a list of prompts with the same options, one after the other or in an engine's slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from cllm_export.errors import PromptError
from cllm_export.runtime.decoding.sampling import MAX_SEED
from cllm_export.runtime.decoding.text import Messages
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions, override
from cllm_export.runtime.request_run import Generation
from cllm_export.runtime.service import Service

Content = str | Sequence[int] | Messages
"""A prompt as ``Model.generate`` takes it."""
Refused = Callable[[int, PromptError], None]
"""Called with the number of a prompt, from 0, and the reason why it cannot be decoded. It may raise."""
Result = Callable[[], Generation]
"""Waits for a request and returns its generation."""
Start = Callable[[list[int], dict[str, Any]], Result]
"""Starts a request from its token ids and the options that this request alone has."""


class DecodedPrompt(NamedTuple):
    """One prompt that was decoded."""

    number: int
    """Its place in the list, from 0."""
    prompt_ids: list[int]
    generation: Generation


def decode_all(
    model: Model,
    prompts: Iterable[Content],
    options: GenerateOptions | None = None,
    *,
    in_slots: bool = False,
    at_most: int | None = None,
    first_seed: int | None = None,
    refused: Refused | None = None,
    progress: Callable[[int], None] | None = None,
    **overrides: Any,
) -> Iterator[DecodedPrompt]:
    """Decode prompts with the same options. Results come in the order of the prompts.

    Args:
        options: options of every prompt. ``overrides`` are options by name, as ``Model.generate`` takes them.
        in_slots: decode as many prompts at once as the engine has slots. By default they run one after the other,
            each when its result is asked for.
        at_most: upper limit of new tokens per prompt; lower where the model's max length leaves less room. The option
            ``max_new_tokens`` is exact instead: it refuses a prompt that leaves too little room.
        first_seed: the seed of prompt 0. Each later prompt has the next number.
        refused: called for each prompt that cannot be decoded. That prompt gives no result.
        progress: called with the number of prompts that are done.

    Raises:
        PromptError: a prompt cannot be decoded, and ``refused`` is not given.
        OptionError: an option is out of range, or ``in_slots`` is set and an option cannot be shared among slots.
        EngineError: the engine failed.
    """
    every = override(options, overrides)
    with _in_slots(model, every) if in_slots else _one_by_one(model, every) as (start, num_ahead):
        waiting: deque[tuple[int, list[int], Result]] = deque()
        for index, prompt in enumerate(prompts):
            try:
                ids = model.encode(prompt)
                own: dict[str, Any] = {} if first_seed is None else {"seed": (first_seed + index) % MAX_SEED}
                if at_most is not None:
                    own["max_new_tokens"] = min(at_most, max(1, model.facts.max_length - len(ids)))
                waiting.append((index, ids, start(ids, own)))
            except PromptError as error:
                if refused is None:
                    raise
                refused(index, error)
            if len(waiting) > num_ahead:
                yield _result(waiting)
            if progress:
                progress(index + 1 - len(waiting))
        while waiting:
            yield _result(waiting)
            if progress:
                progress(index + 1 - len(waiting))


def _result(waiting: deque[tuple[int, list[int], Result]]) -> DecodedPrompt:
    index, ids, result = waiting.popleft()
    return DecodedPrompt(index, ids, result())


@contextmanager
def _one_by_one(model: Model, options: GenerateOptions) -> Iterator[tuple[Start, int]]:
    def start(ids: list[int], own: dict[str, Any]) -> Result:
        generation = model.generate(ids, options, **own)
        return lambda: generation

    yield start, 0


@contextmanager
def _in_slots(model: Model, options: GenerateOptions) -> Iterator[tuple[Start, int]]:
    """All requests of a service share one n. Prompts are submitted ahead, so that no slot waits for the next one."""
    each = replace(options, block_size=None, deterministic=False)
    with Service(model, block_size=options.block_size) as service:
        yield lambda ids, own: service.submit(ids, each, **own).result, 2 * model.engine.num_slots


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first position where two sequences differ, or None where they are equal."""
    if tuple(a) == tuple(b):
        return None
    pairs = zip(a, b, strict=False)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
