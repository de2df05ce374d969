"""The decode of one request, forward by forward: its next block, the tokens of each forward, and its end.

Every loop uses it: one request in one slot (``runtime/model.py``), or many requests in many slots (``batch.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.manifest import Loop
from cllm_export.errors import EngineError, OptionError
from cllm_export.runtime.decoding.drafts.ngram_pool import NgramPool
from cllm_export.runtime.decoding.drafts.sources import DraftRequest, make_proposer
from cllm_export.runtime.decoding.jacobi import Autoregressive, Block, BlockJacobi, Decoder, SlidingJacobi, Speculative
from cllm_export.runtime.decoding.sampling import Logprob, Sampler, logprobs_of
from cllm_export.runtime.decoding.statistics import ForwardRecord

SlotMethod = Literal["jacobi", "jacobi-block", "speculative", "autoregressive"]
Method = Literal[SlotMethod, "lookahead"]
LOOKAHEAD: Literal["lookahead"] = "lookahead"
JacobiMethod = Literal["jacobi", "jacobi-block"]
EarlyEnd = Literal["cancelled", "deadline"]
"""Why a request ended before its own end: somebody stopped it, or its deadline passed."""
FinishReason = Literal["eos", "length", "stop", EarlyEnd]

DECODERS: dict[SlotMethod, type[SlidingJacobi] | type[BlockJacobi] | type[Speculative] | type[Autoregressive]] = {
    "jacobi": SlidingJacobi,
    "jacobi-block": BlockJacobi,
    "speculative": Speculative,
    "autoregressive": Autoregressive,
}
METHODS: tuple[SlotMethod, ...] = tuple(DECODERS)
"""The methods whose requests can share forwards, one slot each, in the graph that every bundle has. Lookahead cannot:
the offsets and the mask of its rows hold for every slot, so it needs the engine for itself."""
METHOD_OF_LOOP: dict[Loop, JacobiMethod] = {"sliding": "jacobi", "block": "jacobi-block"}
"""The decoding method for each loop that a model can be trained with."""

_ONE_AT_A_TIME = (
    "lookahead runs one request at a time, through Model.generate or Model.stream: the size and the mask of its block "
    "hold for the whole forward, so nothing else decodes beside it; choose another method"
)

StopCut = Callable[[list[int]], int | None]
"""Takes new tokens. Returns how many of them remain if a stop string ends the request within them, otherwise None."""


class RequestStatus(Enum):
    """The state of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    """It has a slot, and is in prefill or decodes."""
    FINISHED = "finished"
    """It reached its end: an end-of-sequence token, a stop string or the length limit."""
    CANCELLED = "cancelled"
    """It ended early: its caller, its deadline or a closed service stopped it."""
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


class Decode:
    """The decode of one request: its policy, its limits, and the records of its forwards."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        stop_cut: StopCut | None = None,
        sampler: Sampler | None = None,
        num_logprobs: int | None = None,
    ) -> None:
        self._decoder = decoder
        self._left = max_new_tokens
        self._eos = frozenset(eos_token_ids)
        self._stop_cut = stop_cut
        self._block = Block([], 0)
        self._sampler = sampler
        self._num_logprobs = num_logprobs
        self._position = decoder.write_index + 1
        """Position of the next token that becomes known."""
        self.logprobs: list[Logprob] = []
        """One entry for each new token, if the request asked for them."""
        self.records: list[ForwardRecord] = []
        self.finish_reason: FinishReason | None = None
        """Why the request ended; None while it runs."""

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def cancel(self, reason: EarlyEnd = "cancelled") -> None:
        """End the request early, unless it has already ended."""
        self.finish_reason = self.finish_reason or reason

    @property
    def write_index(self) -> int:
        """Number of valid KV rows in the request's slot. The next block's KV is written there."""
        return self._decoder.write_index

    @property
    def num_rows(self) -> int:
        """KV rows of the slot that hold known tokens, with the accepted rows of an unfinished Jacobi block."""
        if not self.records:
            return self.write_index
        last = self.records[-1]
        return last.write_index + last.num_accepted

    @property
    def needs_logits(self) -> bool:
        """Whether ``take`` needs the logits of the forward."""
        return self._sampler is not None or self._num_logprobs is not None

    def request_draft(self, size: int) -> DraftRequest | None:
        """The request that a draft model must answer before ``next_block`` with this size, or None."""
        return self._decoder.request_draft(size, self._forced(size))

    def next_block(self, size: int) -> Block:
        """The block of ``size`` tokens that the next forward runs at ``write_index``."""
        self._block = self._decoder.next_block(size, self._forced(size))
        return self._block

    def _forced(self, size: int) -> Sequence[int]:
        """The tokens that a grammar forces next, as many as fit into a block of this size."""
        return self._sampler.forced(self.write_index, size - 1) if self._sampler else ()

    def take(self, next_ids: list[int], num_accepted: int, logits: NDArray[np.float32] | None = None) -> list[int]:
        """Take this slot's outputs of that forward. Returns the new tokens, cut at the end of the request.

        ``logits`` [n, V] are read only if ``needs_logits``. If there is a sampler, its tokens replace the graph's.

        Raises:
            EngineError: the engine accepted nothing, or its logits are NaN or missing.
        """
        write_index = self._decoder.write_index
        if self.needs_logits and logits is None:
            raise EngineError("this request needs logits, and the engine gave none")
        if self._sampler and logits is not None:
            next_ids, num_accepted = self._sampler.draw(*self._block, write_index, logits)
        known, num_right, tried = self._decoder.commit(next_ids, num_accepted)
        if not known:  # a sound graph accepts at least one row; a broken one must not cause an endless loop
            raise EngineError(
                f"the engine accepted {num_accepted} rows at write index {write_index}, which makes no token known: "
                "its graph is broken, rebuild the bundle"
            )
        new = self._cut(known)
        if self._sampler:
            self._sampler.accept(new)
        if self._num_logprobs is not None and logits is not None:
            first = self._position - 1 - write_index  # the row that predicts the first new token
            self.logprobs += [
                logprobs_of(logits[first + index], token, self._num_logprobs) for index, token in enumerate(new)
            ]
        self._position += len(new)
        self._left -= len(new)
        if not self._left and not self.is_finished:
            self.finish_reason = "length"
        if lost := len(known) - len(new):
            num_right -= lost - 1  # the first lost token is the bonus, which is no row of the block
        at, tokens, predicted = tried or (write_index, self._block.tokens, next_ids)
        self.records.append(ForwardRecord(at, tokens, predicted, num_right, new))
        return new

    def _cut(self, known: list[int]) -> list[int]:
        """The newly known tokens, cut where the limit, an end-of-sequence token or a stop string ends the request."""
        new = known if len(known) <= self._left else known[: self._left]
        if not self._eos.isdisjoint(new):
            first = next(index for index, token in enumerate(new) if token in self._eos)
            new, self.finish_reason = new[: first + 1], "eos"
        if self._stop_cut and (end := self._stop_cut(new)) is not None:
            new, self.finish_reason = new[:end], "stop"
        return new


def require_shareable(method: Method | None, forwards_per_sync: int | None = None) -> None:
    """Refuse a request that cannot share its forwards with other requests.

    Raises:
        OptionError: its method is lookahead, or its loop would stay on the device.
    """
    if method == LOOKAHEAD:
        raise OptionError(_ONE_AT_A_TIME)
    if forwards_per_sync is not None:
        raise OptionError(
            "forwards_per_sync runs one request at a time, through Model.generate or Model.stream: between its "
            "forwards nobody is asked what else could run; leave it out"
        )


def make_decoder(
    method: Method,
    prompt: Sequence[int],
    *,
    proposer: str,
    seed: int,
    pad_token_id: int,
    pool: NgramPool | None = None,
) -> Decoder:
    """The policy that decodes a prompt after its prefill; see ``make_proposer`` for the proposer.

    Raises:
        OptionError: the proposer does not exist, or it needs a pool and there is none; or the method is lookahead.
    """
    if method == LOOKAHEAD:
        raise OptionError(_ONE_AT_A_TIME)
    return DECODERS[method](
        last_token=prompt[-1],
        write_index=len(prompt) - 1,
        proposer=make_proposer(proposer, prompt=prompt, pad_token_id=pad_token_id, seed=seed, pool=pool),
    )
