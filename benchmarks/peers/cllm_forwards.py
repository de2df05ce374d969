"""Forwards of a bundle on our ONNX Runtime engine, for ``peer_forwards.py``: run with the Python of the package.

A forward is the engine's whole call: lists into its buffers, the graph with the head and the argmax of every row and
the count of what is accepted, and the predictions as lists.
Attention reads as many rows of the cache as a forward needs, rounded up to 16 (to an eighth more from 128 on).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from forward_worker import serve
from numpy.typing import NDArray

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import open_bundle
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.engines.onnxruntime import OrtEngine


class CllmForwards:
    """One slot of an ``OrtEngine``."""

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        bundle = open_bundle(path)
        self._engine = OrtEngine(bundle, num_slots=1, threads=threads)
        self._past = 0
        geometry = self._engine.geometry
        if geometry.cache_length < context_length:
            raise SystemExit(f"{path} has a cache of {geometry.cache_length} rows, below a context of {context_length}")
        machine = describe_machine(threads)
        self.facts = {
            "tool": f"cllm-export on onnxruntime {machine['onnxruntime']}",
            "threads": str(threads),
            "context": str(geometry.cache_length),
            "rows of head": "all, and their argmax",
            "processor": str(machine["processor"]),
        }

    def read(self, past: Sequence[int]) -> None:
        self._engine.prefill(Batch([list(past)], [len(past)], [0]))
        self._past = len(past)

    def forward(self, block: Sequence[int]) -> float:
        blocks = [list(block)]
        started = perf_counter()
        self._engine.forward(Batch(blocks, [1], [self._past]))
        return perf_counter() - started

    def logits(self, block: Sequence[int]) -> NDArray[np.float32]:
        logits = self._engine.forward(Batch([list(block)], [1], [self._past]), with_logits=True).logits
        assert logits is not None
        return logits[0]

    def take_back(self) -> None:
        """Nothing to do: what the write index was not moved over does not count."""


if __name__ == "__main__":
    serve(CllmForwards, "Time forwards of a bundle.")
