"""A loop that ends on the device: a CUDA graph of one WHILE node around the work that a function enqueues.

It does not depend on TensorRT or on decoding. The body is any work on a stream. Its last kernel sets the node's handle
(``cudaGraphSetConditional`` in device code). The kinds of nodes in the body are checked before anything is launched.
Nodes do not show everything, for example a kernel that launches others. CUDA checks this when the graph is
instantiated, and its refusal is reported. None of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cllm_export.errors import EngineError, WhileGraphError
from cllm_export.runtime.engines.cuda import Cuda, version_text

OLDEST = 12040
"""CUDA 12.4, for driver and runtime."""
ALLOWED = frozenset({"Kernel", "Empty", "Memcpy", "Memset", "Graph", "Conditional"})
"""The kinds of nodes that CUDA's documentation allows in the body of a conditional node and its child graphs. There are
no host functions, events, semaphores or allocations."""


def require_while_nodes(cuda: Cuda) -> None:
    """Check that driver and runtime support WHILE nodes.

    Raises:
        WhileGraphError: one of them is older than CUDA 12.4.
    """
    for what, version in zip(("the driver", "cuda-python's runtime"), cuda.versions(), strict=True):
        if version < OLDEST:
            raise WhileGraphError(
                f"a loop on the device needs CUDA {version_text(OLDEST)} or newer, {what} has {version_text(version)}"
            )


class WhileGraph:
    """Runs its body once, and again as long as the body leaves its handle nonzero. Close it after its last run.

    Args:
        cuda: CUDA on the device.
        stream: the stream that records the body and runs the graph.
        enqueue_body: enqueues the body on that stream. Its argument is the handle, which its last kernel must set. It
            is called once, while the stream records. It must not allocate or wait.

    Raises:
        WhileGraphError: this CUDA has no WHILE nodes, or the body has nodes that are not allowed.
    """

    def __init__(self, cuda: Cuda, stream: Any, enqueue_body: Callable[[int], None]) -> None:
        require_while_nodes(cuda)
        self._cuda, self._stream = cuda, stream
        with _refusal("CUDA makes no WHILE node"):
            node = cuda.make_while()
        try:
            with cuda.capture_into(stream, node.body):
                enqueue_body(node.handle)
            _require_body(cuda.node_kinds(node.body))
            with _refusal("CUDA does not take this body in a WHILE node"):
                self._graph = cuda.instantiate(node.graph)
        finally:
            cuda.discard(node.graph)

    def launch(self) -> None:
        """Enqueue one run of the whole loop."""
        self._cuda.launch(self._graph, self._stream)

    def close(self) -> None:
        self._cuda.destroy_graph(self._graph)


def _require_body(kinds: set[str]) -> None:
    if not kinds:
        raise WhileGraphError("the body of the loop enqueued nothing, so that it would never end")
    if wrong := sorted(kinds - ALLOWED):
        raise WhileGraphError(f"the body of a loop on the device may not hold nodes of kind {', '.join(wrong)}")


@contextmanager
def _refusal(words: str) -> Iterator[None]:
    """Turn an error of CUDA into a WhileGraphError that begins with ``words``."""
    try:
        yield
    except EngineError as error:
        raise WhileGraphError(f"{words}: {error}") from error
