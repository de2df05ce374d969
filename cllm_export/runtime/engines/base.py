"""The seam between loops and what runs a forward: ONNX Runtime, TensorRT, the reference, or a fake.

Loops hold policy, engines hold tensors. Shapes are those of ``contract.py``; lists at this seam cost a microsecond a
forward and keep every loop testable without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.contract import FixedShapes, Geometry

KvRows = NDArray[np.generic]
"""KV rows of one slot [2L, K, rows, D], key and value of layer 0, of layer 1, ...: every tensor of the cache has one
shape, so one array holds all. In the engine's dtype; bfloat16, which numpy lacks, as its bits in uint16."""


class Forward(NamedTuple):
    """What one forward gives: ``next_ids`` [B, h], ``num_accepted`` [B], and ``logits`` [B, h, V] if asked for."""

    next_ids: list[list[int]]
    num_accepted: list[int]
    logits: NDArray[np.float32] | None = None
    """The engine's own buffer, good until its next forward."""


class Engine(Protocol):
    """Runs one forward at a time over its static KV cache. Not thread-safe."""

    run_seconds: float
    """Seconds spent inside the engine proper so far, the rest of a loop's time being its overhead."""

    @property
    def geometry(self) -> Geometry: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def fixed_shapes(self) -> FixedShapes | None:
        """The shapes every forward must have, or None where n may vary."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Tokens of the prompt that one prefill forward should take; fixed shapes take their block."""
        ...

    def forward(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        *,
        with_logits: bool = False,
    ) -> Forward:
        """Run a block [B, n] through every slot; see ``contract.py`` for the meaning of each argument.

        ``with_logits`` fetches them; the forward computes them anyway, and its other outputs do not change.

        Nothing is retained of a rejected draft: the caller moves its write index by what it accepts, and the rows
        above stay hidden by the mask until a later forward overwrites them.

        Raises:
            EngineError: the forward leaves the cache, has the wrong shape, or fails.
        """
        ...

    def prefill(
        self, input_ids: Sequence[Sequence[int]], num_committed: Sequence[int], write_index: Sequence[int]
    ) -> None:
        """Write the KV of a chunk of the prompt [B, n]; the head is computed for one row and its output discarded."""
        ...

    def close(self) -> None:
        """Let go of what it holds, on a device above all. It cannot run afterwards; closing it again does nothing."""
        ...


@runtime_checkable
class RowEngine(Engine, Protocol):
    """An engine that hands out KV rows and takes them back: what prefix reuse rests on."""

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        """A copy of the KV rows ``start`` to ``stop`` of one slot.

        Raises:
            EngineError: no such slot, rows outside the cache, or the engine failed.
        """
        ...

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        """Put rows that ``read_rows`` gave into a slot, at the positions that they were read at: keys are rotated.

        Raises:
            EngineError: as ``read_rows``, or the rows have another shape or dtype.
        """
        ...


@runtime_checkable
class LookaheadEngine(Engine, Protocol):
    """An engine that can also run the lookahead graph, over the same KV cache."""

    def require_lookahead(self) -> None:
        """Make ready for ``forward_rows``; what takes time in it is done here.

        Raises:
            OptionError: the bundle has no lookahead graph.
        """
        ...

    def forward_rows(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        row_offsets: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
    ) -> Forward:
        """Run a block [B, n] whose row i sits at ``write_index + row_offsets[i]`` and sees, of the block, row j where
        ``row_mask[i, j]``. Offsets [n] and mask [n, n] hold for every slot.

        KV is written row by row, as in ``forward``: of the leading rows whose offsets are 0, 1, 2, ... it lies where
        later forwards look for it, of all others it is dead.

        Raises:
            OptionError: the bundle has no lookahead graph.
            EngineError: as ``forward``.
        """
        ...


def prefill(engine: Engine, tokens: Sequence[int], pad_token_id: int) -> None:
    """Write the KV of the prompt minus its last token into slot 0, chunk by chunk; the other slots are empty.

    In an engine with fixed shapes the last chunk is padded; the rows of the padding are dead, as a rejected draft's.
    """
    fixed = engine.fixed_shapes
    size = engine.prefill_chunk
    for start in range(0, len(tokens), size):
        chunk = list(tokens[start : start + size])
        num_committed, write_index = [0] * engine.num_slots, [0] * engine.num_slots
        num_committed[0], write_index[0] = len(chunk), start
        padded = chunk + [pad_token_id] * (size - len(chunk)) if fixed else chunk
        engine.prefill([padded] * engine.num_slots, num_committed, write_index)
