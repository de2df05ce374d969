"""The interface between loops and engines. An engine is ONNX Runtime, TensorRT, the reference, or a fake.

Loops hold policy, engines hold tensors. Shapes are those of ``contract.py``. The interface passes lists: they cost a
microsecond per forward, and every loop can be tested without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.contract import Batch, FixedShapes, Geometry, check_rows
from cllm_export.errors import EngineError, OptionError

KvRows = NDArray[np.generic]
"""KV rows of one slot [2L, K, rows, D]: key and value of layer 0, of layer 1, and so on. One array holds all, since
every tensor of the cache has the same shape. The dtype is the engine's; numpy has no bfloat16, so uint16 holds its
bits."""


class Forward(NamedTuple):
    """Outputs of one forward: ``next_ids`` [B, h], ``num_accepted`` [B], and ``logits`` [B, h, V] if asked for."""

    next_ids: list[list[int]]
    num_accepted: list[int]
    logits: NDArray[np.float32] | None = None
    """The engine's own buffer, valid until its next forward."""


class Engine(Protocol):
    """Runs one forward at a time over its static KV cache. Attributes tell what it supports. Not thread-safe."""

    run_seconds: float
    """Seconds spent inside the engine proper so far. The rest of a loop's time is overhead."""

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
        """Number of prompt tokens per prefill forward. With fixed shapes it is their block size."""
        ...

    @property
    def can_copy_rows(self) -> bool:
        """Whether ``read_rows`` and ``write_rows`` work. The prefix cache needs them."""
        ...

    @property
    def has_device_loop(self) -> bool:
        """Whether a loop can run on its device. Then it is a ``TrtEngine``, see ``device_loop.py``."""
        ...

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Each n that it runs as it is, ascending. Blocks in between are padded. Empty where n may be any."""
        ...

    @property
    def max_block_size(self) -> int:
        """The largest n of a decode forward."""
        ...

    @property
    def has_logits(self) -> bool:
        """Whether ``forward`` can fetch logits."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the bits of its forwards depend on besides the bundle, JSON-ready: device and versions of libraries.

        ``device`` is the processor's or the GPU's name, None if it is unknown.
        """
        ...

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        """Run a block [B, n] through every slot; see ``contract.py`` for the meaning of each argument.

        ``with_logits`` fetches the logits. The forward computes them anyway, and its other outputs do not change.

        Rejected drafts need no cleanup. The caller moves its write index by the number of tokens that it accepts. The
        mask hides the rows above, until a later forward overwrites them.

        Raises:
            EngineError: a row of the forward lies outside the cache, the shape is wrong, or the engine failed.
        """
        ...

    def prefill(self, batch: Batch) -> None:
        """Write the KV of a chunk of the prompt [B, n]. The head is computed for one row, and its output discarded."""
        ...

    def close(self) -> None:
        """Free its memory, above all on a device. It cannot run afterwards. Closing it again does nothing."""
        ...

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        """A copy of the KV rows ``start`` to ``stop`` of one slot.

        Raises:
            EngineError: there is no such slot, rows lie outside the cache, or the engine failed or cannot copy rows.
        """
        ...

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        """Write rows from ``read_rows`` into a slot. They keep their positions, because the keys are rotated.

        Raises:
            EngineError: as for ``read_rows``, or the rows have another shape or dtype.
        """
        ...

    def require_lookahead(self) -> None:
        """Prepare for ``forward_rows``. The slow one-time work is done here.

        Raises:
            OptionError: the engine or its bundle has no lookahead graph.
        """
        ...

    def forward_rows(self, batch: Batch, row_offsets: NDArray[np.int64], row_mask: NDArray[np.bool_]) -> Forward:
        """Run a block [B, n] through the lookahead graph, over the same KV cache.

        Row i has the position ``write_index + row_offsets[i]``. Within the block it sees row j if ``row_mask[i, j]``.
        Offsets [n] and mask [n, n] hold for every slot.

        KV is written row by row, as in ``forward``. Leading rows with the offsets 0, 1, 2, ... lie where later forwards
        read them. All other rows are dead.

        Raises:
            OptionError: as for ``require_lookahead``.
            EngineError: as for ``forward``.
        """
        ...


class EngineBase:
    """Base of all engines: their facts, the checks before a forward, and errors for calls that they do not support.

    Args:
        geometry: the geometry of the model.
        num_slots: B.
        prefill_chunk: number of prompt tokens per prefill forward.
        fixed_shapes: the shapes that every forward must have, or None where n may vary.
    """

    can_copy_rows = False
    has_device_loop = False
    block_sizes: tuple[int, ...] = ()
    has_logits = True
    _AFTER_CLOSE = "load the bundle again"

    def __init__(
        self, geometry: Geometry, *, num_slots: int, prefill_chunk: int, fixed_shapes: FixedShapes | None = None
    ) -> None:
        self.geometry = geometry
        self.num_slots = num_slots
        self.prefill_chunk = prefill_chunk
        self.fixed_shapes = fixed_shapes
        self.run_seconds = 0.0
        self._is_closed = False

    @property
    def max_block_size(self) -> int:
        return self.geometry.max_block_size

    def describe(self) -> dict[str, Any]:
        return {"device": None}

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        raise self._no_rows()

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        raise self._no_rows()

    def require_lookahead(self) -> None:
        raise OptionError(f"{type(self).__name__} runs no lookahead graph: choose another method")

    def forward_rows(self, batch: Batch, row_offsets: NDArray[np.int64], row_mask: NDArray[np.bool_]) -> Forward:
        self.require_lookahead()
        raise AssertionError("an engine that has a lookahead graph runs it itself")

    def _no_rows(self) -> EngineError:
        return EngineError(f"{type(self).__name__} cannot hand out its rows: run it without a prefix cache")

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError(f"this engine is closed; {self._AFTER_CLOSE}")

    def _check_rows(self, slot: int, start: int, stop: int) -> None:
        self._require_open()
        check_rows(slot=slot, start=start, stop=stop, num_slots=self.num_slots, geometry=self.geometry)

    def _check_batch(self, batch: Batch) -> int:
        """Check that the engine is open and that each slot has a block of one size and two numbers. Returns n.

        Raises:
            EngineError: the engine is closed, or the forward has another shape.
        """
        self._require_open()
        input_ids, num_committed, write_index = batch
        if not len(input_ids) == len(num_committed) == len(write_index) == self.num_slots:
            raise EngineError(
                f"a forward needs a block, num_committed and write_index for each of {self.num_slots} slots, got "
                f"{len(input_ids)}, {len(num_committed)} and {len(write_index)}"
            )
        size = len(input_ids[0])
        if any(len(block) != size for block in input_ids):
            raise EngineError(f"the blocks of one forward must all have {size} tokens, got {list(map(len, input_ids))}")
        return size


def as_batch(engine: Engine, tokens: Sequence[int], num_committed: int, write_index: int) -> Batch:
    """A block in slot 0; the other slots are idle."""
    idle = engine.num_slots - 1
    return Batch([tokens] * (1 + idle), [num_committed] + [0] * idle, [write_index] + [0] * idle)


def prefill(engine: Engine, tokens: Sequence[int], pad_token_id: int) -> None:
    """Write the KV of ``tokens``, a prompt without its last token, into slot 0. The other slots are empty.

    It runs chunk by chunk. With fixed shapes the last chunk is padded. The padding's rows are dead, like those of a
    rejected draft.
    """
    fixed = engine.fixed_shapes
    size = engine.prefill_chunk
    for start in range(0, len(tokens), size):
        chunk = list(tokens[start : start + size])
        num_committed, write_index = [0] * engine.num_slots, [0] * engine.num_slots
        num_committed[0], write_index[0] = len(chunk), start
        padded = chunk + [pad_token_id] * (size - len(chunk)) if fixed else chunk
        engine.prefill(Batch([padded] * engine.num_slots, num_committed, write_index))
