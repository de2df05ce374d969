"""Which block sizes give the rows of n = 1, bit for bit, on the engine that runs here.

A row is exact at n if a forward of n tokens gives it the logits and the KV that forwards of one token give it, over the
same cache. Where every row is, decoding at n makes the tokens of n = 1, whatever the drafts are: near ties round alike.
So a size counts only if each of its rows was compared: as a block, and as a chunk of a prompt that a prefill reads. The
work is a fixed number of forwards, and no clock is read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
adds up in more than one part. All is compared again in the longest text that the cache has room for."""
MAX_COPIED = 1024
"""KV rows that are copied at once, which bounds the memory for them."""


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


class Row(NamedTuple):
    """Stands for the bits of a row in one slot."""

    logits: bytes
    kv: bytes
    """Empty where the engine cannot hand out its KV."""


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
        texts = [[generator.randrange(vocabulary) for _ in range(start + count)] for start in self._starts]
        self._pasts = [text[:start] for text, start in zip(texts, self._starts, strict=True)]
        self._tokens = [text[start:] for text, start in zip(texts, self._starts, strict=True)]
        self.fill(engine.prefill_chunk, most=prefilled)
        if prefilled:
            for slot, start in enumerate(self._starts):
                self._copy_up(slot, min(prefilled, start), start)
        self._rows = self._rows_of_one()
        self._past_of_one: list[bytes] | None = None

    def fill(self, width: int, *, most: int | None = None) -> None:
        """Prefill the past of every slot in chunks of this width, or the first ``most`` rows of it."""
        end = min(max(self._starts), most or max(self._starts))
        texts = [past + tokens for past, tokens in zip(self._pasts, self._tokens, strict=True)]
        for begin in range(0, end, width):
            size = min(width, end - begin)
            chunks = [text[begin : begin + size] for text in texts]
            slots = self._engine.num_slots
            self._engine.prefill(Batch(chunks, [size] * slots, [begin] * slots))

    def stretch(self, longest: int) -> bool:
        """Move the rows of slot 0 up, after ``longest`` KV rows. The other slots stay, beside a longer text.

        The new rows of the past are copies, which cost no forward. Returns whether forwards of one token still give the
        other slots the rows that they gave before: attention must add up their few rows alike, whatever the extent of
        the batch. The rows of before stay the ones to compare with.
        """
        written = self._starts[0] + self._count
        self._copy_up(0, written, longest)
        self._starts[0] = longest
        found, before = self._rows_of_one(), self._rows
        self._rows = [(own[0], *others[1:]) for own, others in zip(found, before, strict=True)]
        return found == self._rows

    def are_given_by(self, size: int, *, num_blocks: int | None = 1) -> bool:
        """Whether blocks of this size, one after the other, give every row bit for bit.

        A prefill of the first block must write the same KV too, where the engine takes so long a chunk: it may have
        kernels of its own.

        Args:
            num_blocks: how many blocks to compare; None for as many as there are rows for.
        """
        most = self._count // size
        blocks = range(most if num_blocks is None else min(num_blocks, most))
        return (
            bool(blocks)
            and all(
                self._forward(block * size, size) == self._rows[block * size : (block + 1) * size] for block in blocks
            )
            and self._are_read_by(size)
        )

    def sizes_that_give_them(self, sizes: Iterable[int], *, num_blocks: int | None = 1) -> frozenset[int]:
        """Those of these sizes for which ``are_given_by`` holds. None if it does not hold for 1, as for its prefill."""
        if not self.are_given_by(1):
            return frozenset()
        return frozenset(size for size in sizes if self.are_given_by(size, num_blocks=num_blocks))

    def past_is_given_by(self, width: int) -> bool:
        """Whether prefill in chunks of this width gives every slot's past the KV of forwards of one token."""
        if self._past_of_one is None:
            texts = [past + tokens for past, tokens in zip(self._pasts, self._tokens, strict=True)]
            for row in range(max(self._starts)):
                self._run([[text[row]] for text in texts], [row] * self._engine.num_slots)
            self._past_of_one = self._past()
        self.fill(width)
        return self._past() == self._past_of_one

    def past_is_kept(self, num_blocks: int = 1) -> bool:
        """Whether the past, read and written back as the prefix cache does, gives the same rows again."""
        held = [self._engine.read_rows(slot, 0, start) for slot, start in enumerate(self._starts)]
        for slot, (rows, start) in enumerate(zip(held, self._starts, strict=True)):
            self._engine.write_rows(slot, 0, start, np.zeros_like(rows))
        for slot, (rows, start) in enumerate(zip(held, self._starts, strict=True)):
            self._engine.write_rows(slot, 0, start, rows)
        return all(self._forward(row, 1) == self._rows[row : row + 1] for row in range(num_blocks))

    def _are_read_by(self, size: int) -> bool:
        """Whether a prefill of the first rows writes their KV."""
        if not self._engine.can_copy_rows or size > self._engine.prefill_chunk:
            return True
        slots = self._engine.num_slots
        self._engine.prefill(Batch([tokens[:size] for tokens in self._tokens], [size] * slots, list(self._starts)))
        expected = [[row.kv for row in slot] for slot in zip(*self._rows[:size], strict=True)]
        return self._kv(self._starts, size) == expected

    def _copy_up(self, slot: int, count: int, stop: int) -> None:
        """Repeat the first ``count`` rows of a slot, which are written, up to row ``stop``."""
        while 0 < count < stop:
            size = min(count, MAX_COPIED, stop - count)
            self._engine.write_rows(slot, count, count + size, self._engine.read_rows(slot, 0, size))
            count += size

    def _rows_of_one(self) -> list[tuple[Row, ...]]:
        """Every compared row, by forwards of one token: for each row, those of every slot."""
        return [row for index in range(self._count) for row in self._forward(index, 1)]

    def _forward(self, row: int, size: int) -> list[tuple[Row, ...]]:
        """Rows ``row`` to ``row + size`` by one forward: for each row, those of every slot."""
        begins = [start + row for start in self._starts]
        logits = self._run([tokens[row : row + size] for tokens in self._tokens], begins)
        kv = self._kv(begins, size)
        rows = [
            [Row(_digest(found), written) for found, written in zip(*slot, strict=True)]
            for slot in zip(logits, kv, strict=True)
        ]
        return list(zip(*rows, strict=True))

    def _kv(self, begins: Sequence[int], size: int) -> list[list[bytes]]:
        """Digests [B][size] of the KV rows that begin there."""
        if not self._engine.can_copy_rows:
            return [[b""] * size for _ in begins]
        kv = [self._engine.read_rows(slot, begin, begin + size) for slot, begin in enumerate(begins)]
        return [[_digest(rows[:, :, index]) for index in range(size)] for rows in kv]

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
    """Compare a block and a prefill of each size with n = 1, in every slot: in a short text, then in the longest.

    With several slots, one has the longest text beside short ones. The engine must have logits, and n that may vary.

    Raises:
        EngineError: the engine failed.
    """
    if not sizes:
        return ExactSizes()
    prefilled, longest = min(PREFILLED, engine.prefill_chunk), room_before(engine, max(sizes))
    most = min(PAST if engine.can_copy_rows else prefilled, longest)
    rows = RowsOfOne(engine, past=most, count=max(sizes), prefilled=min(prefilled, most))
    equal = rows.sizes_that_give_them(sizes)
    if engine.can_copy_rows and most < longest:
        equal = rows.sizes_that_give_them(sorted(equal)) if rows.stretch(longest) else frozenset()
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
        once = max(wanted) * time(1) + 2 * sum(map(time, [1, *wanted]))  # a forward and a prefill of each size
        cost = time(PREFILLED) + 2 * once  # in a short text and in a long one
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
