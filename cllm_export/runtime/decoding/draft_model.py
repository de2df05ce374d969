"""A draft model: another bundle with the same tokenizer, whose greedy tokens are drafts for the model that verifies.

It has its own engine and KV cache, with one lane for each slot of the model. It decodes by sliding Jacobi. A CLLM uses
the n that it was trained with. Any other model uses n = 1, which is autoregressive decoding. The drafts are always
verified, so at a fixed n they cannot change a token. Source: speculative decoding (arXiv 2211.17192).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import TOKENIZER_NAME, Bundle, ProposerName, TrainedWith
from cllm_export.errors import BundleError, EngineError, OptionError
from cllm_export.runtime.decoding.drafts.sources import DraftRequest, make_proposer
from cllm_export.runtime.decoding.jacobi import SlidingJacobi
from cllm_export.runtime.engines.base import Engine

UNTRAINED = TrainedWith(block_size=1, proposer="pad", loop="sliding")
IGNORED_TOKENIZER_KEYS = ("truncation", "padding")
"""Settings that trainers leave in a ``tokenizer.json``. ``TextCodec`` turns them off."""


class Drafter(Protocol):
    """Answers the draft requests of all slots together, before a forward."""

    @property
    def run_seconds(self) -> float:
        """Seconds spent inside the draft model's engine so far."""
        ...

    def draft(self, requests: Mapping[int, DraftRequest]) -> None:
        """Answer the draft request of each slot in ``DraftRequest.found``.

        The answer has fewer tokens if the model can hold no more.
        """
        ...


class DraftModel:
    """Drafts in the slots of one engine, in lockstep: each forward advances every lane whose answer is incomplete.

    A lane keeps its tokens, and their KV stays in its slot. A new draft request reuses the prefix that it shares with
    them, even if another request left them. The other rows are dead: the lane only moves its write index.

    Args:
        engine: has as many slots as the engine of the model that verifies.
        max_length: the most tokens of a text that a lane holds.
        pad_token_id: fills unused rows.
        trained_with: how a CLLM was trained; None for other models.
    """

    def __init__(
        self, engine: Engine, *, max_length: int, pad_token_id: int, trained_with: TrainedWith | None = None
    ) -> None:
        self._engine = engine
        self._pad = pad_token_id
        self._width = engine.fixed_shapes.block_size if engine.fixed_shapes else None
        largest = self._width or engine.geometry.max_block_size
        settled = trained_with or UNTRAINED
        size = min(settled.block_size, largest)
        self._lanes = [
            Lane(
                block_size=size,
                max_width=max(size, min(engine.prefill_chunk, largest)),
                proposer=settled.proposer,
                pad_token_id=pad_token_id,
                max_length=max_length,
            )
            for _ in range(engine.num_slots)
        ]

    @property
    def run_seconds(self) -> float:
        """Seconds spent inside the engine so far."""
        return self._engine.run_seconds

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def draft(self, requests: Mapping[int, DraftRequest]) -> None:
        """Answer the draft request of each slot in ``DraftRequest.found``; see ``Drafter``.

        Raises:
            EngineError: the engine failed.
        """
        lanes = {index: self._lanes[index] for index in requests}
        for index, lane in lanes.items():
            lane.start(requests[index].tokens, requests[index].count)
        while short := [index for index, lane in lanes.items() if lane.is_short]:
            self._forward(short)
        for index, lane in lanes.items():
            requests[index].found = lane.found

    def _forward(self, short: Sequence[int]) -> None:
        """Run one forward: the lanes in ``short`` prefill or draft, and the others idle over their dead rows."""
        idle = Rows([], 0)
        rows = [lane.next_rows() if index in short else idle for index, lane in enumerate(self._lanes)]
        width = self._width or max(len(tokens) for tokens, _ in rows)
        input_ids = [[*tokens, *[self._pad] * (width - len(tokens))] for tokens, _ in rows]
        num_committed = [committed for _, committed in rows]
        batch = Batch(input_ids, num_committed, [lane.write_index for lane in self._lanes])
        if all(self._lanes[index].is_prefilling for index in short):
            self._engine.prefill(batch)
            for index in short:
                self._lanes[index].has_prefilled()
            return
        forward = self._engine.forward(batch)
        for index in short:
            self._lanes[index].take(forward.next_ids[index], forward.num_accepted[index])


class Rows(NamedTuple):
    """The tokens that a lane gives to a forward, and how many of them are known to be right."""

    tokens: list[int]
    num_committed: int


class Lane:
    """One text in one slot: the tokens of a draft request, then the tokens that the draft model adds."""

    def __init__(
        self, *, block_size: int, max_width: int, proposer: ProposerName, pad_token_id: int, max_length: int
    ) -> None:
        self._block_size = block_size
        self._max_width = max_width
        self._proposer = proposer
        self._pad = pad_token_id
        self._max_length = max_length
        self._tokens: list[int] = []
        self._num_written = 0
        """Number of leading tokens whose KV is valid."""
        self._first = self._goal = 0
        """Number of tokens of the draft request, without and with the answer."""
        self._decoder: SlidingJacobi | None = None
        self._rows = Rows([], 0)
        self._num_unread = 0
        self.is_prefilling = False
        """Whether the last ``next_rows`` was a prefill chunk, which gives no token."""

    @property
    def write_index(self) -> int:
        """Where the slot's next rows are written. It stays within the cache, even if the loop ran past its end."""
        return min(self._num_written, self._max_length - 1)

    @property
    def is_short(self) -> bool:
        """Whether the answer needs more forwards."""
        return len(self._tokens) < self._goal

    @property
    def found(self) -> list[int]:
        """The answer to the draft request."""
        return self._tokens[self._first : self._goal]

    def start(self, tokens: list[int], count: int) -> None:
        """Take a draft request. If the lane's text already begins with ``tokens``, decoding just continues."""
        self._first, self._goal = len(tokens), min(len(tokens) + count, self._max_length)
        shared = num_shared(self._tokens, tokens)
        if shared == len(tokens):
            return
        self._num_written = min(self._num_written, shared)
        self._tokens = list(tokens)
        proposer = make_proposer(self._proposer, prompt=tokens, pad_token_id=self._pad, seed=0)
        self._decoder = SlidingJacobi(last_token=tokens[-1], write_index=len(tokens) - 1, proposer=proposer)

    def next_rows(self) -> Rows:
        """The rows of the next forward at ``write_index``: unread tokens, then the loop's block if there is room."""
        assert self._decoder, "a lane that is short has been started"
        unread = self._tokens[self._num_written : -1]
        self.is_prefilling = len(unread) >= self._max_width
        self._num_unread = min(len(unread), self._max_width)
        if self.is_prefilling:
            self._rows = Rows(unread[: self._max_width], self._max_width)
        else:
            block = self._decoder.next_block(min(self._block_size, self._max_width - len(unread)))
            self._rows = Rows([*unread, *block.tokens], len(unread) + block.num_committed)
        return self._rows

    def has_prefilled(self) -> None:
        """Note that the KV of the unread tokens in the last rows is written."""
        self._num_written += self._num_unread

    def take(self, next_ids: Sequence[int], num_accepted: int) -> None:
        """Take the outputs of the forward for this lane."""
        self.has_prefilled()
        if self.is_prefilling or not self._decoder:
            return
        size = len(self._rows.tokens)
        new = self._decoder.commit(
            list(next_ids[self._num_unread : size]), min(num_accepted, size) - self._num_unread
        ).tokens
        if not new:
            raise EngineError("the draft model's engine accepted nothing: its graph is broken, rebuild the bundle")
        self._tokens += new
        self._num_written = self._decoder.write_index


def num_shared(known: Sequence[int], tokens: Sequence[int]) -> int:
    """Length of the common prefix."""
    most = min(len(known), len(tokens))
    if known[:most] == tokens[:most]:
        return most
    return next(index for index in range(most) if known[index] != tokens[index])


def check_pair(model: Bundle, draft: Bundle) -> None:
    """Refuse a draft model that has another tokenizer, or that holds shorter texts than the model.

    Raises:
        OptionError: the vocabulary size or the tokenizer differs, or the draft model's length is too small. The
            message says which and how.
    """
    ours, theirs = model.manifest, draft.manifest
    name = f"draft model {draft.path}"
    if ours.geometry.vocab_size != theirs.geometry.vocab_size:
        raise OptionError(
            f"{name} has {theirs.geometry.vocab_size} tokens and the model {ours.geometry.vocab_size}: "
            "take one with the same tokenizer"
        )
    if differing := _differing_keys(model, draft):
        raise OptionError(
            f"{name} has another tokenizer ({TOKENIZER_NAME} differs in {', '.join(differing)}): "
            "take one with the same tokenizer"
        )
    if theirs.max_length < ours.max_length:
        raise OptionError(
            f"{name} holds {theirs.max_length} tokens and the model {ours.max_length}: "
            f"build it with max_length={ours.max_length}"
        )


def _differing_keys(model: Bundle, draft: Bundle) -> list[str]:
    """Sections in which two tokenizers differ, without ``IGNORED_TOKENIZER_KEYS``."""
    ours, theirs = (_read_tokenizer(bundle) for bundle in (model, draft))
    keys = sorted((ours.keys() | theirs.keys()) - set(IGNORED_TOKENIZER_KEYS))
    return [key for key in keys if ours.get(key) != theirs.get(key)]


def _read_tokenizer(bundle: Bundle) -> dict[str, Any]:
    path = bundle.file(TOKENIZER_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} is not a tokenizer: it holds no JSON object")
    return content
