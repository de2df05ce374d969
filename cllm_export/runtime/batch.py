"""Many prompts through the slots of one engine, each by its own policy; a slot that is done takes the next prompt.

Prompts are read as they are decoded, by the same forwards: a slot that is still reading feeds prompt tokens as its
block, all of them committed. So no slot waits for another's prompt, and what a slot does not use is dead rows, as a
rejected draft's are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cllm_export.bundle import FillName
from cllm_export.contract import require_at_least
from cllm_export.errors import OptionError
from cllm_export.runtime.engine import Engine
from cllm_export.runtime.request import Decode, Method, make_decoder
from cllm_export.runtime.statistics import ForwardRecord

MIN_READING_WIDTH = 16
"""Tokens that a forward takes at least while some slot reads its prompt, where the engine lets n vary: at n = 1 a
prompt would otherwise be read a token a forward."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """One prompt of a batch."""

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    """Of the ``prompt`` fill."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise OptionError("a prompt of a batch must hold at least one token")
        require_at_least("max_new_tokens", self.max_new_tokens, 1)


def decode_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    method: Method,
    block_size: int,
    fill: FillName,
    seed: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    pad_token_id: int,
) -> list[tuple[ForwardRecord, ...]]:
    """Decode prompts (token ids) greedily, as many at once as the engine has slots; the forwards of each, in order.

    Each gives the tokens, and the forwards, that it gives alone: slots do not see each other. (Through an engine that
    rounds differently for different shapes, but for ties.)

    Raises:
        OptionError: a prompt is empty, or an option is out of range.
        EngineError: the engine failed, or a prompt and its new tokens do not fit.
    """
    requests = [BatchRequest(prompt=prompt, max_new_tokens=max_new_tokens, seed=seed) for prompt in prompts]
    decodes = decode_requests(
        engine,
        requests,
        method=method,
        block_size=block_size,
        fill=fill,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )
    return [tuple(decode.records) for decode in decodes]


def decode_requests(
    engine: Engine,
    requests: Sequence[BatchRequest],
    *,
    method: Method,
    block_size: int,
    fill: FillName,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    finished: Callable[[int], None] | None = None,
) -> list[Decode]:
    """Like ``decode_batch``, with a limit and a seed for each prompt; ``finished`` is called with the number done."""
    require_at_least("block_size", block_size, 1)

    def start(request: BatchRequest) -> Decode:
        decoder = make_decoder(
            method, request.prompt, block_size=block_size, fill=fill, seed=request.seed, pad_token_id=pad_token_id
        )
        return Decode(decoder, max_new_tokens=request.max_new_tokens, eos_token_ids=eos_token_ids)

    slots = [_Slot(block_size, pad_token_id) for _ in range(engine.num_slots)]
    decodes: list[Decode] = []
    num_done = 0
    while num_done < len(requests):
        for slot in slots:
            if slot.is_idle and len(decodes) < len(requests):
                request = requests[len(decodes)]
                decodes.append(start(request))
                slot.admit(request.prompt, decodes[-1])
        ended = _step(engine, slots, block_size)
        num_done += ended
        if ended and finished:
            finished(num_done)
    return decodes


def _step(engine: Engine, slots: Sequence[_Slot], block_size: int) -> int:
    """One forward for all slots; how many requests it ended."""
    width = _width(engine, slots, block_size)
    rows = [slot.next_rows(width) for slot in slots]
    blocks, num_committed, write_index = zip(*rows, strict=True)
    forward = engine.forward(blocks, num_committed, write_index)
    outputs = zip(slots, forward.next_ids, forward.num_accepted, strict=True)
    return sum(slot.take(next_ids, num_accepted) for slot, next_ids, num_accepted in outputs)


def _width(engine: Engine, slots: Sequence[_Slot], block_size: int) -> int:
    if engine.fixed_shapes or not any(slot.is_reading for slot in slots):
        return block_size
    return max(block_size, min(MIN_READING_WIDTH, engine.geometry.max_block_size))


class _Slot:
    """One slot: idle, reading its prompt, or decoding."""

    def __init__(self, block_size: int, pad_token_id: int) -> None:
        self._block_size = block_size
        self._pad = pad_token_id
        self._unread: Sequence[int] = ()
        self._num_read = self._num_reading = 0
        self._decode: Decode | None = None

    @property
    def is_idle(self) -> bool:
        return self._decode is None

    @property
    def is_reading(self) -> bool:
        return self._num_read < len(self._unread)

    def admit(self, prompt: Sequence[int], decode: Decode) -> None:
        """Take the next request; what the slot held before is dead."""
        self._unread, self._num_read, self._decode = prompt[:-1], 0, decode

    def next_rows(self, width: int) -> tuple[list[int], int, int]:
        """The slot's block [width], its committed tokens and its write index; an idle slot's are pad, 0 and 0."""
        if self._decode is None:
            return [self._pad] * width, 0, 0
        if self.is_reading:
            chunk = list(self._unread[self._num_read : self._num_read + width])
            self._num_reading = len(chunk)
            return self._padded(chunk, width), len(chunk), self._num_read
        tokens, num_committed = self._decode.next_block()
        return self._padded(tokens, width), num_committed, self._decode.write_index

    def take(self, next_ids: list[int], num_accepted: int) -> bool:
        """Take the outputs for the slot; whether its request ended."""
        if self._decode is None:
            return False
        if self.is_reading:
            self._num_read += self._num_reading
            return False
        self._decode.take(next_ids[: self._block_size], min(num_accepted, self._block_size))
        if self._decode.finish == "closed":
            return False
        self._decode = None
        return True

    def _padded(self, tokens: Sequence[int], width: int) -> list[int]:
        return [*tokens, *[self._pad] * (width - len(tokens))]
