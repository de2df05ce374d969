"""Draft, then verify: speculative decoding as policy, whatever the source of the draft.

With prompt lookup it is prompt lookup decoding, with a draft model classic speculative decoding (arXiv 2211.17192,
2302.01318); but a draft is right where it is the token that greedy decoding or the seed's noise gives, so that no
distribution of the draft model is needed. Unlike the Jacobi loops it keeps nothing that the model itself predicted.
"""

from __future__ import annotations

from cllm_export.runtime.draft import Fill, Wish
from cllm_export.runtime.jacobi import Block, Commit


class Speculative:
    """Every block is what the source guesses for the text so far. The block size may change at any forward."""

    def __init__(self, *, last_token: int, write_index: int, fill: Fill) -> None:
        self.write_index = write_index
        self._fill = fill
        self._block = [last_token]

    def wish(self, size: int) -> Wish | None:
        missing = size - len(self._block)
        return self._fill.wish(missing, self._block[1:]) if missing > 0 else None

    def next_block(self, size: int) -> Block:
        if missing := max(0, size - len(self._block)):
            self._block += self._fill.guess(missing, self._block[1:])
        del self._block[size:]
        return Block(self._block, 1)

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        self.write_index += num_accepted
        new, rejected = next_ids[:num_accepted], self._block[num_accepted:]
        self._block = new[-1:]
        self._fill.accept(new)
        self._fill.reject(rejected, next_ids[num_accepted:])
        return Commit(new, num_accepted)
