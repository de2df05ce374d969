"""Count the bytes that an engine copies between host and device, for ``gpu_forwards.py``.

The engine's own copy calls are counted. What the driver sends by itself (commands, kernel arguments, marks) is not
included; a profiler shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from cllm_export.runtime.engines.cuda import Cuda, Direction

Crossed = dict[str, int]
"""Bytes by direction: ``to device``, ``to host``."""


def nothing() -> Crossed:
    return {"to device": 0, "to host": 0}


class CountingCuda(Cuda):
    """Counts the bytes of every copy over the bus. Copies of a captured graph count at each launch."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        self.crossed = nothing()
        self._recording: Crossed | None = None
        self._graphs: dict[int, tuple[Any, Crossed]] = {}

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: Any) -> None:
        super().copy(target, source, size, direction, stream)
        if direction != "on device":
            (self.crossed if self._recording is None else self._recording)[direction] += size

    @contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        self._recording = recorded = nothing()
        try:
            with super().capture(stream) as captured:
                yield captured
        finally:
            self._recording = None
        self._graphs[id(captured[0])] = (captured[0], recorded)

    def launch(self, graph: Any, stream: Any) -> None:
        super().launch(graph, stream)
        _, recorded = self._graphs.get(id(graph), (graph, nothing()))
        for direction, size in recorded.items():
            self.crossed[direction] += size


def count_on_cuda(cuda: CountingCuda, run: Callable[[], object]) -> Crossed:
    """Run a function and return the bytes that cross the bus."""
    before = dict(cuda.crossed)
    run()
    return {direction: size - before[direction] for direction, size in cuda.crossed.items()}


def count_on_ort(run: Callable[[], object]) -> Crossed:
    """Run a function and return the bytes that ONNX Runtime copies into and out of its device values."""
    import onnxruntime

    crossed, value = nothing(), onnxruntime.OrtValue
    write, read = value.update_inplace, value.numpy

    def update_inplace(self: Any, array: Any) -> None:
        crossed["to device"] += array.nbytes
        write(self, array)

    def numpy(self: Any) -> Any:
        array = read(self)
        crossed["to host"] += array.nbytes
        return array

    with patch.object(value, "update_inplace", update_inplace), patch.object(value, "numpy", numpy):
        run()
    return crossed
