"""The first forwards of a plan on a card: that it runs, and gives what can be tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cllm_export.bundle.contract import Batch
from cllm_export.errors import EngineError

if TYPE_CHECKING:
    from cllm_export.tensorrt.engine import TrtEngine


def run_smoke(engine: TrtEngine, *, every_kv_length: bool = False) -> None:
    """Run a prefill chunk, and a block of each size. The KV cache holds what they wrote afterwards.

    Args:
        every_kv_length: run each block size at each KV length of the plan, instead of the shortest.

    Raises:
        EngineError: a forward failed, or gave no token ids or counts that can be.
    """
    slots, chunk = engine.num_slots, engine.prefill_chunk
    engine.prefill(Batch([[0] * chunk] * slots, [chunk] * slots, [0] * slots))
    for size in engine.block_sizes:
        lengths = [length for length in engine.kv_lengths if length > size]
        for length in lengths if every_kv_length else lengths[:1]:
            forward = engine.forward(Batch([[0] * size] * slots, [1] * slots, [length - size] * slots))
            _check(forward.next_ids, forward.num_accepted, size, engine.geometry.vocab_size)


def _check(next_ids: list[list[int]], num_accepted: list[int], size: int, vocab_size: int) -> None:
    sound = all(1 <= count <= size for count in num_accepted)
    if not sound or not all(0 <= token < vocab_size for row in next_ids for token in row):
        raise EngineError(f"a block of {size} gave next_ids {next_ids} and num_accepted {num_accepted}")
