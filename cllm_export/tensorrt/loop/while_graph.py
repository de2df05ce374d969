"""A loop that ends on the device: a CUDA graph of one WHILE node around whatever a function enqueues.

It knows nothing of TensorRT or of decoding: the body is any work on a stream, the last kernel of which sets the node's
handle (``cudaGraphSetConditional`` in device code). What a body may hold is checked before anything is launched, and
what nodes do not show, as a kernel that launches others, is left to CUDA: what it refuses when the graph is made
launchable is told. Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cllm_export.errors import EngineError, WhileGraphError
from cllm_export.runtime.engines.cuda import Cuda, version_text

OLDEST = 12040
"""CUDA 12.4, of driver and runtime."""
ALLOWED = frozenset({"Kernel", "Empty", "Memcpy", "Memset", "Graph", "Conditional"})
"""The kinds of nodes that CUDA documents for the body of a conditional node, child graphs likewise: no host function,
no event, no semaphore, no allocation."""


def require_while_nodes(cuda: Cuda) -> None:
    """Check that driver and runtime have WHILE nodes.

    Raises:
        WhileGraphError: one of them is older than CUDA 12.4.
    """
    for what, version in zip(("the driver", "cuda-python's runtime"), cuda.versions(), strict=True):
        if version < OLDEST:
            raise WhileGraphError(
                f"a loop on the device needs CUDA {version_text(OLDEST)} or newer, {what} has {version_text(version)}"
            )


class WhileGraph:
    """Runs its body once, and again as long as the body leaves its handle other than 0. Close it after its last run.

    Args:
        cuda: of the device.
        stream: what the body is recorded on and the graph launched on.
        enqueue_body: enqueues the body on that stream; it takes the handle, which its last kernel must set. Called
            once, while the stream records. Allocates nothing and waits for nothing.

    Raises:
        WhileGraphError: this CUDA has no WHILE nodes, or the body holds what no such body may hold.
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
        """Enqueue a whole run of the loop."""
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
    """CUDA's error in a step as the reason that there is no such loop."""
    try:
        yield
    except EngineError as error:
        raise WhileGraphError(f"{words}: {error}") from error
