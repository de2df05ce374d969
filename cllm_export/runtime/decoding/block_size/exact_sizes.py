"""Which block sizes give the rows of n = 1, bit for bit, on the engine that runs here.

A row is exact at n if a forward of n tokens gives it the logits and the KV that forwards of one token give it, over the
same cache. Where every row is, decoding at n makes the tokens of n = 1, whatever the drafts are: near ties round alike.
So a size counts only if each of its rows was compared. The work is a fixed number of forwards, and no clock is read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cllm_export.bundle.contract import Batch
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.block_size.latency import ForwardTimes
from cllm_export.runtime.engines.base import Engine

BUDGET_SECONDS = 2.0
"""What a comparison before a first request may take, by the times of forwards that are known then."""
FIRST_BUDGETS = 5
"""How many budgets the first size alone may take."""
PREFILLED = 16
"""KV rows that a comparison before a first request prefills."""
PAST = 17 * PREFILLED
"""KV rows before the compared ones there. The others are copies, which cost no forward. Attention over so many rows
adds up in more than one part, as it does in long texts."""


@dataclass(frozen=True, kw_only=True)
class ExactSizes:
    """The block sizes that were compared with n = 1. A size in neither set was not compared."""

    equal: frozenset[int] = frozenset()
    """Sizes whose rows are those of n = 1, bit for bit."""
    different: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not all(type(size) is int and size >= 1 for size in self.compared):
            raise OptionError(f"block sizes are positive integers, got {sorted(map(str, self.compared))}")
        if both := self.equal & self.different:
            raise OptionError(f"a block size cannot be both equal and different: {sorted(both)}")

    @property
    def compared(self) -> frozenset[int]:
        return self.equal | self.different

    def joined(self, other: ExactSizes) -> ExactSizes:
        """What both found. A size that differed once is different."""
        different = self.different | other.different
        return ExactSizes(equal=(self.equal | other.equal) - different, different=different)

    def to_dict(self) -> dict[str, list[int]]:
        """Both sets, sorted, JSON-ready."""
        return {"equal": sorted(self.equal), "different": sorted(self.different)}

    @classmethod
    def of_dict(cls, found: Mapping[str, Iterable[int]]) -> ExactSizes:
        """The inverse of ``to_dict``.

        Raises:
            OptionError, KeyError, TypeError: it is nothing that ``to_dict`` gave.
        """
        return cls(equal=frozenset(found["equal"]), different=frozenset(found["different"]))


class RowsOfOne:
    """Rows of random texts, one for each slot, as forwards of one token give them, to compare other forwards with.

    Every other slot is a row behind, so that slots differ in more than their texts. The comparison overwrites KV rows
    of every slot, which no text may use then.

    Args:
        engine: has logits, and n that may vary.
        past: KV rows before the compared ones. The engine's prefill writes them.
        count: number of compared rows. The cache must have room for all.
        prefilled: prefill only this many rows of the past, and copy them for the rest. By default all of it.
        seed: of the texts.

    Raises:
        EngineError: the engine failed.
    """

    def __init__(self, engine: Engine, *, past: int, count: int, prefilled: int | None = None, seed: int = 0) -> None:
        generator = random.Random(seed)  # noqa: S311 - test data, not a secret
        vocabulary = engine.geometry.vocab_size
        self._engine, self._count = engine, count
        self._starts = [past - slot % 2 if past else 0 for slot in range(engine.num_slots)]
        self._texts = [[generator.randrange(vocabulary) for _ in range(start + count)] for start in self._starts]
        self.fill(engine.prefill_chunk, most=prefilled)
        if prefilled:
            self._copy_up(prefilled)
        self._rows = [digest for row in range(count) for digest in self._forward(row, 1)]

    def fill(self, width: int, *, most: int | None = None) -> None:
        """Prefill the past of every slot in chunks of this width, or the first ``most`` rows of it."""
        end = min(max(self._starts), most or max(self._starts))
        for begin in range(0, end, width):
            size = min(width, end - begin)
            chunks = [text[begin : begin + size] for text in self._texts]
            slots = self._engine.num_slots
            self._engine.prefill(Batch(chunks, [size] * slots, [begin] * slots))

    def are_given_by(self, size: int, *, num_blocks: int | None = 1) -> bool:
        """Whether blocks of this size, one after the other, give every row bit for bit.

        Args:
            num_blocks: how many blocks to compare; None for as many as there are rows for.
        """
        most = self._count // size
        blocks = range(most if num_blocks is None else min(num_blocks, most))
        return bool(blocks) and all(
            self._forward(block * size, size) == self._rows[block * size : (block + 1) * size] for block in blocks
        )

    def past_is_given_by(self, width: int) -> bool:
        """Whether prefill in chunks of this width gives every slot's past the KV of forwards of one token."""
        for row in range(max(self._starts)):
            self._run([[text[row]] for text in self._texts], [row] * self._engine.num_slots)
        expected = self._past()
        self.fill(width)
        return self._past() == expected

    def past_is_kept(self, num_blocks: int = 1) -> bool:
        """Whether the past, read and written back as the prefix cache does, gives the same rows again."""
        held = [self._engine.read_rows(slot, 0, start) for slot, start in enumerate(self._starts)]
        for slot, (rows, start) in enumerate(zip(held, self._starts, strict=True)):
            self._engine.write_rows(slot, 0, start, np.zeros_like(rows))
        for slot, (rows, start) in enumerate(zip(held, self._starts, strict=True)):
            self._engine.write_rows(slot, 0, start, rows)
        return all(self._forward(row, 1) == self._rows[row : row + 1] for row in range(num_blocks))

    def _copy_up(self, count: int) -> None:
        """Repeat the first rows of every slot up to its start."""
        for slot, start in enumerate(self._starts):
            rows = self._engine.read_rows(slot, 0, min(count, start))
            for begin in range(count, start, count):
                stop = min(begin + count, start)
                self._engine.write_rows(slot, begin, stop, rows[:, :, : stop - begin])

    def _forward(self, row: int, size: int) -> list[tuple[bytes, ...]]:
        """Digests of logits and KV of rows ``row`` to ``row + size``: for each row, those of every slot."""
        begins = [start + row for start in self._starts]
        blocks = [text[begin : begin + size] for text, begin in zip(self._texts, begins, strict=True)]
        logits = self._run(blocks, begins)
        digests = [[_digest(each) for each in slot] for slot in logits]
        if self._engine.can_copy_rows:
            for slot, begin in enumerate(begins):
                kv = self._engine.read_rows(slot, begin, begin + size)
                digests[slot] = [digest + _digest(kv[:, :, index]) for index, digest in enumerate(digests[slot])]
        return list(zip(*digests, strict=True))

    def _run(self, blocks: list[list[int]], begins: list[int]) -> np.ndarray:
        """Logits [B, n, V] of a forward."""
        forward = self._engine.forward(Batch(blocks, [1] * self._engine.num_slots, begins), with_logits=True)
        assert forward.logits is not None, "the engine was asked for logits"
        return forward.logits

    def _past(self) -> list[bytes]:
        return [_digest(self._engine.read_rows(slot, 0, start)) for slot, start in enumerate(self._starts)]


def _digest(values: np.ndarray) -> bytes:
    """Stands for the bits of an array, which would take too much memory for every row of a large vocabulary."""
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def compare_sizes(engine: Engine, sizes: Sequence[int]) -> ExactSizes:
    """Compare one block of each size with n = 1, in every slot. The engine must have logits, and n that may vary.

    Raises:
        EngineError: the engine failed.
    """
    if not sizes:
        return ExactSizes()
    prefilled = min(PREFILLED, engine.prefill_chunk)
    most = min(PAST if engine.can_copy_rows else prefilled, room_before(engine, max(sizes)))
    rows = RowsOfOne(engine, past=most, count=max(sizes), prefilled=min(prefilled, most))
    equal = frozenset(size for size in sizes if rows.are_given_by(size))
    return ExactSizes(equal=equal, different=frozenset(sizes) - equal)


def affordable_sizes(
    sizes: Sequence[int], seconds: Mapping[int, float], *, budget: float = BUDGET_SECONDS
) -> tuple[int, ...]:
    """The first of these sizes, as many as ``compare_sizes`` compares within the budget.

    The first alone may take ``FIRST_BUDGETS`` times as long: it is the most useful one, and it is compared once. If it
    takes longer, no other is compared in its place.

    Args:
        sizes: block sizes, the most useful first.
        seconds: seconds of a forward by block size, of n = 1 at least. Those of other sizes follow from them.
    """
    time = ForwardTimes(seconds).relative
    chosen: list[int] = []
    for size in sizes:
        wanted = [*chosen, size]
        cost = time(PREFILLED) + max(wanted) * time(1) + sum(map(time, wanted))
        if cost <= budget * (1 if chosen else FIRST_BUDGETS):
            chosen = wanted
        elif not chosen:
            break
    return tuple(chosen)


def room_before(engine: Engine, count: int) -> int:
    """How many KV rows may lie before ``count`` compared ones: with them they are a text of at most the maximum length.

    A forward at the last row then has room for a block of any size, as an engine may pad its blocks to.
    """
    return max(0, engine.geometry.cache_length - (engine.geometry.max_block_size - 1) - count)
