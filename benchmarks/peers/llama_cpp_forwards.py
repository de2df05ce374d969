"""Forwards of llama.cpp, for ``peer_forwards.py``: run with the Python that ``setup.sh DIR llama_cpp`` installs it for.

A forward is ``llama_decode`` of a batch that asks for the logits of every row, as verifying a block needs them. Not
timed, in its favour: filling the batch, the argmax of the rows, and ``llama_memory_seq_rm``, which takes the block's
rows out of the cache again. Settings are llama.cpp's own: a 16-bit KV cache, read in steps of 256 rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from forward_worker import serve
from llama_context import LlamaContext
from numpy.typing import NDArray


class LlamaForwards:
    """One sequence of one context, and a batch for each length of block."""

    def __init__(self, model: Path, threads: int, context_length: int) -> None:
        self._llama = LlamaContext(model, context_length=context_length, threads=threads)
        self._memory = self._llama.lib.llama_get_memory(self._llama.context)
        self._width = self._llama.vocab_size
        self._past = 0
        self._batches: dict[int, Any] = {}
        self.facts = {
            "tool": f"llama.cpp, {self._llama.version}",
            "threads": str(threads),
            "context": str(context_length),
            "rows of head": "all",
            "built with": self._llama.lib.llama_print_system_info().decode().strip(),
        }

    def read(self, past: Sequence[int]) -> None:
        lib = self._llama.lib
        lib.llama_memory_clear(self._memory, False)
        tokens = (ctypes.c_int32 * len(past))(*past)  # a batch only points to them
        self._llama.forward(lib.llama_batch_get_one(tokens, len(past)))
        lib.llama_synchronize(self._llama.context)
        self._past = len(past)

    def forward(self, block: Sequence[int]) -> float:
        batch = self._make_batch(block)
        started = perf_counter()
        self._llama.forward(batch)
        self._llama.lib.llama_synchronize(self._llama.context)
        return perf_counter() - started

    def logits(self, block: Sequence[int]) -> NDArray[np.float32]:
        self.forward(block)
        lib, context = self._llama.lib, self._llama.context
        rows = range(len(block))
        return np.stack(
            [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), (self._width,)).copy() for row in rows]
        )

    def take_back(self) -> None:
        if not self._llama.lib.llama_memory_seq_rm(self._memory, 0, self._past, -1):
            raise SystemExit(f"llama.cpp does not take back the rows from {self._past} on")

    def _make_batch(self, block: Sequence[int]) -> Any:
        size = len(block)
        if size not in self._batches:
            self._batches[size] = self._llama.lib.llama_batch_init(size, 0, 1)
        batch = self._batches[size]
        batch.n_tokens = size
        for row, token in enumerate(block):
            batch.token[row], batch.pos[row] = token, self._past + row
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, 0, 1
        return batch


if __name__ == "__main__":
    serve(LlamaForwards, "Time forwards of llama.cpp.")
