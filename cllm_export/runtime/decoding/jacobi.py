"""The two Jacobi loops as policy, and their seam: which block the next forward verifies, and what its outputs commit.

No tensors, no engine: ``next_block`` says what to run at ``write_index``, ``commit`` takes the outputs. Rejecting a
draft token is nothing but moving ``write_index`` by fewer rows than the block has. Sources: CLLM (arXiv 2403.00835),
Jacobi Forcing (2512.14681), Jacobi decoding (2305.10427).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cllm_export.runtime.decoding.drafts.sources import DraftRequest, Proposer


class Block(NamedTuple):
    """Tokens [n] for one forward, the first ``num_committed`` of them known to be right."""

    tokens: list[int]
    num_committed: int


class Tried(NamedTuple):
    """The text that a forward verified, where its block holds more than that."""

    position: int
    """Of its first token, which was known."""
    tokens: list[int]
    next_ids: list[int]
    """The prediction after each of ``tokens``."""


class Commit(NamedTuple):
    """What a forward's outputs came to."""

    tokens: list[int]
    """Tokens now known that were not known before, the bonus included."""
    num_accepted: int
    """Rows of the block, or of what it tried, that the policy took as right."""
    tried: Tried | None = None
    """None where the block itself is the text that was tried."""


class Decoder(Protocol):
    """The policy of one request."""

    write_index: int
    """Valid KV rows of the request's slot; where the next block's KV is written."""

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        """What a draft model must answer before ``next_block`` with the same arguments; None for nothing."""
        ...

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        """The block that the next forward runs, ``size`` tokens. Until ``commit`` it may be asked for again.

        ``forced`` tokens are known to follow the text: they are committed rows, as far as the block has room for them.
        """
        ...

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        """Take one forward's outputs for this slot."""
        ...


class Window:
    """A block that begins with the last committed token, and goes on with a draft that the proposer makes long enough.

    What a policy keeps of a forward's predictions is its own matter. The block size may change at any forward.
    """

    def __init__(self, *, last_token: int, write_index: int, proposer: Proposer) -> None:
        self.write_index = write_index
        self._proposer = proposer
        self._block = [last_token]

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        self._block[1 : 1 + len(forced)] = forced
        missing = size - len(self._block)
        return self._proposer.request_draft(missing, self._block[1:]) if missing > 0 else None

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        self._block[1 : 1 + len(forced)] = forced
        if missing := size - len(self._block):
            if missing > 0:
                self._block += self._proposer.propose(missing, self._block[1:])
            else:
                del self._block[size:]
        return Block(self._block, min(1 + len(forced), size))

    def _move(self, next_ids: list[int], num_accepted: int, kept: slice) -> Commit:
        """Commit what was accepted, tell the proposer, and keep these predictions for the next block."""
        self.write_index += num_accepted
        new, rejected = next_ids[:num_accepted], self._block[num_accepted:]
        self._block = next_ids[kept]
        self._proposer.accept(new)
        self._proposer.reject(rejected, next_ids[num_accepted:])
        return Commit(new, num_accepted)


class SlidingJacobi(Window):
    """Sliding Jacobi: after each forward the window moves past what was accepted and is filled up again.

    With m draft tokens right, one forward commits m + 1 tokens: the last is the bonus, the model's own token after
    the last right one. The predictions beyond it are the next draft.
    """

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        return self._move(next_ids, num_accepted, slice(num_accepted - 1, None))


class BlockJacobi:
    """Block Jacobi (the CLLM paper's): a block is iterated to its fixed point, then the next one starts after it.

    The write index stays until then: rows already accepted are computed again, as in a fixed-shape engine. Tokens are
    handed out as soon as they are known. A block keeps the size it began with.
    """

    def __init__(self, *, last_token: int, write_index: int, proposer: Proposer) -> None:
        self.write_index = write_index
        self._proposer = proposer
        self._num_known = 0
        self._last = last_token
        self._block: list[int] = []

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        return None if self._block else self._proposer.request_draft(size - 1, ())

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        if not self._block:
            self._block = [self._last, *self._proposer.propose(size - 1, ())]
        first = 1 + self._num_known
        kept = forced[: len(self._block) - first]
        self._block[first : first + len(kept)] = kept
        return Block(self._block, first + len(kept) if kept else 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        new = next_ids[self._num_known : num_accepted]
        self._proposer.accept(new)
        self._proposer.reject(self._block[num_accepted:], next_ids[num_accepted:])
        self._num_known = num_accepted
        if num_accepted == len(self._block):
            self.write_index += num_accepted
            self._num_known = 0
            self._last, self._block = next_ids[-1], []
        else:
            self._block = [self._block[0], *next_ids[:-1]]
        return Commit(new, num_accepted)


class Autoregressive:
    """One token a forward, whatever the block size.

    With blocks of 1 it is ordinary decoding. With n it runs the n-shaped forward of Jacobi decoding and keeps
    one token of it, so that both use the same engine and shape and must agree exactly. Tokens that a grammar forces are
    decoded like any others, which makes it what forced ones are compared with.
    """

    def __init__(self, *, last_token: int, write_index: int, proposer: Proposer) -> None:
        self.write_index = write_index
        self._last = last_token
        self._proposer = proposer
        self._is_filled = False

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        return None  # whatever fills the block is thrown away

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        self._is_filled = size > 1
        return Block([self._last, *self._proposer.propose(size - 1, ())] if self._is_filled else [self._last], 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        self.write_index += 1
        self._last = next_ids[0]
        if self._is_filled:
            self._proposer.accept((self._last,))
        return Commit([self._last], 1)


class Speculative(Window):
    """Every draft is what the proposer guesses for the text so far."""

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        return self._move(next_ids, num_accepted, slice(num_accepted - 1, num_accepted))
