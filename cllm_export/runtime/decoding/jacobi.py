"""The decoding policies: each says which block the next forward verifies, and what its outputs commit.

A policy uses no tensors and no engine. ``next_block`` gives the block to run at ``write_index``, and ``commit`` takes
the outputs. To reject draft tokens, a policy moves ``write_index`` by fewer rows than the block has. Sources: CLLM
(arXiv 2403.00835), Jacobi Forcing (2512.14681), Jacobi decoding (2305.10427).
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
    """The text that a forward verified, if its block holds more rows than that text."""

    position: int
    """Position of the first token, which was known before the forward."""
    tokens: list[int]
    next_ids: list[int]
    """The prediction after each of ``tokens``."""


class Commit(NamedTuple):
    """What a policy made of a forward's outputs."""

    tokens: list[int]
    """Tokens that this forward made known, with the bonus."""
    num_accepted: int
    """Rows that the policy accepted, of the block or of ``tried``."""
    tried: Tried | None = None
    """None if the block itself is the text that the forward verified."""


class Decoder(Protocol):
    """The policy of one request."""

    write_index: int
    """Number of valid KV rows in the request's slot. The next block's KV is written there."""

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        """The request that a draft model must answer before ``next_block`` with the same arguments, or None."""
        ...

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        """The block of ``size`` tokens that the next forward runs. It may be called again until ``commit``.

        ``forced`` tokens are known to follow the text. As many as fit into the block become committed rows.
        """
        ...

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        """Take one forward's outputs for this slot."""
        ...


class Window:
    """A block of the last committed token and a draft, which the proposer extends to the block size.

    Each subclass chooses which predictions of a forward it keeps as draft. The block size may change at any forward.
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
        """Commit the accepted rows, report them to the proposer, and keep these predictions for the next block."""
        self.write_index += num_accepted
        new, rejected = next_ids[:num_accepted], self._block[num_accepted:]
        self._block = next_ids[kept]
        self._proposer.accept(new)
        self._proposer.reject(rejected, next_ids[num_accepted:])
        return Commit(new, num_accepted)


class SlidingJacobi(Window):
    """Sliding Jacobi: after each forward the window moves past the accepted rows, and the proposer refills it.

    If m draft tokens are right, the forward commits m + 1 tokens. The last one is the bonus: the model's own token
    after the last right one. The predictions after the bonus are the next draft.
    """

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        return self._move(next_ids, num_accepted, slice(num_accepted - 1, None))


class BlockJacobi:
    """Block Jacobi (from the CLLM paper): a block is iterated to its fixed point, then the next block starts after it.

    The write index does not move before the fixed point: accepted rows are computed again, as in a fixed-shape engine.
    Tokens are handed out as soon as they are known. A block keeps its first size.
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
    """One token per forward, at any block size.

    A block size of 1 is ordinary decoding. With n, it runs the same n-wide forward as Jacobi decoding and keeps one
    token. Engine and shape are then equal, so the two must agree exactly. Tokens that a grammar forces are decoded
    like all others, so this policy is the reference for forced tokens.
    """

    def __init__(self, *, last_token: int, write_index: int, proposer: Proposer) -> None:
        self.write_index = write_index
        self._last = last_token
        self._proposer = proposer
        self._is_filled = False

    def request_draft(self, size: int, forced: Sequence[int] = ()) -> DraftRequest | None:
        return None  # the tokens that fill the block are discarded

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
    """Speculative decoding: the proposer makes every draft from the text so far. No predictions are kept as draft."""

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        return self._move(next_ids, num_accepted, slice(num_accepted - 1, num_accepted))
