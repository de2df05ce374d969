"""Draft, then verify: speculative decoding as policy, whatever the source of the draft.

With prompt lookup it is prompt lookup decoding, with a draft model classic speculative decoding (arXiv 2211.17192,
2302.01318); but a draft is right where it is the token that greedy decoding or the seed's noise gives, so that no
distribution of the draft model is needed. Unlike the Jacobi loops it keeps nothing that the model itself predicted.
"""

from __future__ import annotations

from cllm_export.runtime.jacobi import Commit, Window


class Speculative(Window):
    """Every draft is what the fill guesses for the text so far."""

    def commit(self, next_ids: list[int], num_accepted: int) -> Commit:
        return self._move(next_ids, num_accepted, slice(num_accepted - 1, num_accepted))
