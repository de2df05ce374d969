"""The two Jacobi loops as policy: which block the next forward verifies, and what its outputs commit.

No tensors, no engine: ``next_block`` says what to run at ``write_index``, ``commit`` takes the outputs. Rejecting a
draft token is nothing but moving ``write_index`` by fewer rows than the block has. Sources: CLLM (arXiv 2403.00835),
Jacobi Forcing (2512.14681), Jacobi decoding (2305.10427).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cllm_export.runtime.draft import Fill


class Block(NamedTuple):
    """Tokens [n] for one forward, the first ``num_committed`` of them known to be right."""

    tokens: list[int]
    num_committed: int


class Commit(NamedTuple):
    """What a forward's outputs came to."""

    tokens: list[int]
    """Tokens now known that were not known before, the bonus included."""
    num_accepted: int
    """Rows of the block that the policy took as right."""


class Decoder(Protocol):
    """The policy of one request."""

    write_index: int
    """Valid KV rows of the request's slot; where the next block's KV is written."""

    def next_block(self) -> Block:
        """The block the next forward runs."""
        ...

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        """Take one forward's outputs for this slot."""
        ...


class SlidingJacobi:
    """Sliding Jacobi: after each forward the window moves past what was accepted and is filled up again.

    With m draft tokens right, one forward commits m + 1 tokens: the last is the bonus, the model's own token after
    the last right one. The predictions beyond it are the next draft.
    """

    def __init__(self, *, last_token: int, write_index: int, block_size: int, fill: Fill) -> None:
        self.write_index = write_index
        self._fill = fill
        self._block = [last_token, *fill.guess(block_size - 1, ())]

    def next_block(self) -> Block:
        return Block(self._block, 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        self.write_index += num_accepted
        new, kept = next_ids[:num_accepted], next_ids[num_accepted - 1 :]
        self._fill.accept(new)
        self._block = kept + self._fill.guess(num_accepted - 1, kept[1:])
        return Commit(new, num_accepted)


class BlockJacobi:
    """Block Jacobi (the CLLM paper's): a block is iterated to its fixed point, then the next one starts after it.

    The write index stays until then: rows already accepted are computed again, as in a fixed-shape engine. Tokens are
    handed out as soon as they are known.
    """

    def __init__(self, *, last_token: int, write_index: int, block_size: int, fill: Fill) -> None:
        self.write_index = write_index
        self._fill = fill
        self._size = block_size
        self._num_known = 0
        self._block = self._first_guess(last_token)

    def next_block(self) -> Block:
        return Block(self._block, 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        new = next_ids[self._num_known : num_accepted]
        self._fill.accept(new)
        self._num_known = num_accepted
        if num_accepted == self._size:
            self.write_index += self._size
            self._num_known = 0
            self._block = self._first_guess(next_ids[-1])
        else:
            self._block = [self._block[0], *next_ids[:-1]]
        return Commit(new, num_accepted)

    def _first_guess(self, last_token: int) -> list[int]:
        return [last_token, *self._fill.guess(self._size - 1, ())]
