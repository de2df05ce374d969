"""Autoregressive decoding as policy: one token a forward. The baseline, and what every other loop must equal."""

from __future__ import annotations

from collections.abc import Sequence

from cllm_export.runtime.draft import Fill, Wish
from cllm_export.runtime.jacobi import Block, Commit


class Autoregressive:
    """One token a forward, whatever the block size.

    With blocks of 1 it is ordinary decoding. With n it runs the n-shaped forward of Jacobi decoding and keeps
    one token of it, so that both use the same engine and shape and must agree exactly. Tokens that a grammar forces are
    decoded like any others, which makes it what forced ones are compared with.
    """

    def __init__(self, *, last_token: int, write_index: int, fill: Fill) -> None:
        self.write_index = write_index
        self._last = last_token
        self._fill = fill
        self._is_filled = False

    def wish(self, size: int, forced: Sequence[int] = ()) -> Wish | None:
        return None  # whatever fills the block is thrown away

    def next_block(self, size: int, forced: Sequence[int] = ()) -> Block:
        self._is_filled = size > 1
        return Block([self._last, *self._fill.guess(size - 1, ())] if self._is_filled else [self._last], 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        self.write_index += 1
        self._last = next_ids[0]
        if self._is_filled:
            self._fill.accept((self._last,))
        return Commit([self._last], 1)
