"""Forwards of ONNX Runtime GenAI, for ``peer_forwards.py``: run with the Python of the environment of ``setup.sh``.

A forward is ``append_tokens`` of a block; ``rewind_to`` the past after it is not timed, nor is any choice of a token.
Its model must compute logits of every row, as the builder makes it unless told ``prune_lm_head=true``: asking for
logits checks it. The cache is allocated for the whole context; attention reads as much of it as is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from forward_worker import serve
from genai import GenAI
from numpy.typing import NDArray


class GenAIForwards:
    """One generator, which is rewound."""

    def __init__(self, model: Path, threads: int, context_length: int) -> None:
        self._peer = GenAI(model, threads)
        self._context_length = context_length
        self._past = 0
        self.facts = {
            "tool": f"{self._peer.tool} {self._peer.version}",
            "threads": str(threads),
            "context": str(context_length),
            "rows of head": "all",
        }

    def read(self, past: Sequence[int]) -> None:
        self._generator = self._peer.make_generator(self._context_length)
        self._generator.append_tokens(np.array(past, np.int32))
        self._past = len(past)

    def forward(self, block: Sequence[int]) -> float:
        tokens = np.array(block, np.int32)
        started = perf_counter()
        self._generator.append_tokens(tokens)
        return perf_counter() - started

    def logits(self, block: Sequence[int]) -> NDArray[np.float32]:
        self.forward(block)
        logits: NDArray[np.float32] = self._generator.get_output("logits")
        if logits.shape[1] != len(block):
            raise SystemExit(
                f"this model gives logits of {logits.shape[1]} of {len(block)} rows: build it without prune_lm_head"
            )
        return logits[0]

    def take_back(self) -> None:
        self._generator.rewind_to(self._past)


if __name__ == "__main__":
    serve(GenAIForwards, "Time forwards of ONNX Runtime GenAI.")
