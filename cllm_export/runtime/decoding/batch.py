"""Decodes many prompts, all known beforehand, in the slots of one engine.

Evaluation, collection and held-out decoding use it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cllm_export.bundle.manifest import ProposerName
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.request import Decode, Method, make_decoder
from cllm_export.runtime.decoding.scheduler import Scheduler
from cllm_export.runtime.decoding.task import Task
from cllm_export.runtime.engines.base import Engine

MIN_PREFILL_WIDTH = 16
"""Prompt tokens that a forward may take even if n is smaller, in engines that let n vary. Without it, prefill at n = 1
would read one token per forward."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """One prompt of a batch."""

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    """Seed of the ``prompt`` proposer."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise OptionError("a prompt of a batch must hold at least one token")
        require_at_least("max_new_tokens", self.max_new_tokens, 1)


def decode_requests(
    engine: Engine,
    requests: Sequence[BatchRequest],
    *,
    method: Method,
    block_size: int,
    proposer: ProposerName,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    finished: Callable[[int], None] | None = None,
) -> list[Decode]:
    """Decode prompts (token ids) greedily, as many at once as the engine has slots.

    The results are in the order of the requests; ``Decode.records`` holds the forwards of each. Slots do not see each
    other, so a prompt gives the tokens and the forwards that it gives alone. Ties are an exception in an engine that
    rounds differently for different shapes.

    Args:
        finished: called whenever a prompt is done, with the number of prompts done so far.

    Raises:
        OptionError: an option is out of range.
        EngineError: the engine failed, or a prompt and its new tokens do not fit.
    """
    num_done = 0

    def ended(_: Task) -> None:
        nonlocal num_done
        num_done += 1
        if finished:
            finished(num_done)

    prefill_width = min(MIN_PREFILL_WIDTH, engine.geometry.max_block_size)
    scheduler = Scheduler(engine, block_size=block_size, pad_token_id=pad_token_id, prefill_width=prefill_width)
    tasks = []
    for request in requests:
        decoder = make_decoder(method, request.prompt, proposer=proposer, seed=request.seed, pad_token_id=pad_token_id)
        decode = Decode(decoder, max_new_tokens=request.max_new_tokens, eos_token_ids=eos_token_ids)
        tasks.append(Task(request.prompt, decode, ended=ended))
        scheduler.submit(tasks[-1])
    while not scheduler.is_idle:
        scheduler.step()
        if failed := next((task for task in tasks if task.error), None):
            raise failed.error or AssertionError
    return [task.decode for task in tasks]
