"""One request's decode, forward by forward: what it runs next, what a forward's outputs come to, and where it ends.

Shared by whatever decodes: one request in one slot (``runtime/model.py``) or many in many (``batch.py``).
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
FinishReason = Literal["eos", "length", "stop", "cancelled"]

DECODERS: dict[SlotMethod, type[SlidingJacobi] | type[BlockJacobi] | type[Speculative] | type[Autoregressive]] = {
    "jacobi": SlidingJacobi,
    "jacobi-block": BlockJacobi,
    "speculative": Speculative,
    "autoregressive": Autoregressive,
}
METHODS: tuple[SlotMethod, ...] = tuple(DECODERS)
"""The loops that share forwards slot by slot, in the graph that every bundle has. Lookahead is none of them: what the
rows of its forward are to each other holds for every slot, so it has the engine for itself."""
METHOD_OF_LOOP: dict[Loop, JacobiMethod] = {"sliding": "jacobi", "block": "jacobi-block"}
"""The method that decodes in the form a model was trained for."""

_ONE_AT_A_TIME = (
    "lookahead runs one request at a time, through Model.generate or Model.stream: the size and the mask of its block "
    "hold for the whole forward, so nothing else decodes beside it; choose another method"
)

StopCut = Callable[[list[int]], int | None]
"""How many of these new tokens are left where a stop string ends the request among them; None where none does."""


class RequestStatus(Enum):
    """Where a request is on its way."""

    WAITING = "waiting"
    RUNNING = "running"
    """It has a slot: its prompt is read, or it decodes."""
    FINISHED = "finished"
    """It ended by its own rules."""
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


class Decode:
    """The decode of one request: a policy, its limits, and the record of its forwards."""

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
        """Of the next token to become known."""
        self.logprobs: list[Logprob] = []
        """Of every new token, where they were asked for."""
        self.records: list[ForwardRecord] = []
        self.finish_reason: FinishReason | None = None
        """Why it has ended; None as long as it runs."""

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """End it here, if it has not ended."""
        self.finish_reason = self.finish_reason or "cancelled"

    @property
    def write_index(self) -> int:
        """Valid KV rows of the request's slot; where the next block's KV is written."""
        return self._decoder.write_index

    @property
    def num_rows(self) -> int:
        """KV rows of the slot that are those of known tokens: of the block loop's unfinished block as well."""
        if not self.records:
            return self.write_index
        last = self.records[-1]
        return last.write_index + last.num_accepted

    @property
    def needs_logits(self) -> bool:
        """Whether ``take`` needs the logits of the forward."""
        return self._sampler is not None or self._num_logprobs is not None

    def request_draft(self, size: int) -> DraftRequest | None:
        """What a draft model must answer before ``next_block`` of this size is called; None for nothing."""
        return self._decoder.request_draft(size, self._forced(size))

    def next_block(self, size: int) -> Block:
        """The block that the next forward runs at ``write_index``, ``size`` tokens of it."""
        self._block = self._decoder.next_block(size, self._forced(size))
        return self._block

    def _forced(self, size: int) -> Sequence[int]:
        """What a grammar leaves no choice about, as far as a block of this size has room."""
        return self._sampler.forced(self.write_index, size - 1) if self._sampler else ()

    def take(self, next_ids: list[int], num_accepted: int, logits: NDArray[np.float32] | None = None) -> list[int]:
        """Take the outputs of that forward for this slot; the new tokens, cut at the end of the request.

        ``logits`` [n, V] are read where ``needs_logits`` says so; a sampler's tokens then stand for the graph's.

        Raises:
            EngineError: the engine accepted nothing, or its logits are NaN or missing.
        """
        write_index = self._decoder.write_index
        if self.needs_logits and logits is None:
            raise EngineError("this request needs logits, and the engine gave none")
        if self._sampler and logits is not None:
            next_ids, num_accepted = self._sampler.draw(*self._block, write_index, logits)
        known, num_right, tried = self._decoder.commit(next_ids, num_accepted)
        if not known:  # a sound graph accepts one row at least; a broken one must not loop for ever
            raise EngineError(
                f"the engine accepted {num_accepted} rows at write index {write_index}, which makes no token known: "
                "its graph is broken, rebuild the bundle"
            )
        new = self._cut(known)
        if self._sampler:
            self._sampler.accept(new)
        if self._num_logprobs is not None and logits is not None:
            first = self._position - 1 - write_index  # the row that predicts the first of them
            self.logprobs += [
                logprobs_of(logits[first + index], token, self._num_logprobs) for index, token in enumerate(new)
            ]
        self._position += len(new)
        self._left -= len(new)
        if not self._left and not self.is_finished:
            self.finish_reason = "length"
        if lost := len(known) - len(new):
            num_right -= lost - 1  # the bonus is lost first, and is no row of the block
        at, tokens, predicted = tried or (write_index, self._block.tokens, next_ids)
        self.records.append(ForwardRecord(at, tokens, predicted, num_right, new))
        return new

    def _cut(self, known: list[int]) -> list[int]:
        """What is left of newly known tokens at the end of the request: limit, end-of-sequence token, stop string."""
        new = known if len(known) <= self._left else known[: self._left]
        if not self._eos.isdisjoint(new):
            first = next(index for index, token in enumerate(new) if token in self._eos)
            new, self.finish_reason = new[: first + 1], "eos"
        if self._stop_cut and (end := self._stop_cut(new)) is not None:
            new, self.finish_reason = new[:end], "stop"
        return new


def require_shareable(method: Method | None, forwards_per_sync: int | None = None) -> None:
    """Refuse a request whose forwards no other can share.

    Raises:
        OptionError: its method is lookahead, or its loop is to stay on the device.
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
    """The policy that decodes a prompt whose KV, less that of its last token, is written; see ``make_proposer``.

    Raises:
        OptionError: no such proposer, or it needs a pool and there is none; or a method that has no policy of a slot of
            its own.
    """
    if method == LOOKAHEAD:
        raise OptionError(_ONE_AT_A_TIME)
    return DECODERS[method](
        last_token=prompt[-1],
        write_index=len(prompt) - 1,
        proposer=make_proposer(proposer, prompt=prompt, pad_token_id=pad_token_id, seed=seed, pool=pool),
    )
