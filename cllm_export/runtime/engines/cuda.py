"""The few calls of the CUDA runtime that engines and plans make, each checked, and what GPU there is.

A wrapper of ``cuda.bindings.runtime`` (cuda-python 12.8 or newer), which needs no CUDA toolkit. It knows nothing of
TensorRT and allocates nothing by itself: whoever allocates frees. A machine without a GPU is told so in a sentence,
before any library is loaded that would crash there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cllm_export.errors import EngineError, GpuError, MissingExtraError

DRIVER_LIBRARY = "libcuda.so.1"
ADVICE = "see what this machine has with: cllm-export doctor"
Direction = Literal["to device", "to host", "on device"]

CUDA_13 = 13000
"""From this version of the runtime on, the bindings' ``cudaGraphAddNode`` takes the data of edges too."""
_NODE_KIND = "cudaGraphNodeType"

_KINDS = {
    "to device": "cudaMemcpyHostToDevice",
    "to host": "cudaMemcpyDeviceToHost",
    "on device": "cudaMemcpyDeviceToDevice",
}


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """The GPU that work runs on, as its driver describes it."""

    name: str
    compute_capability: str
    """``major.minor``."""
    memory: int
    """Bytes; on a Jetson those of the memory that it shares with the processor."""
    driver: str
    """The newest CUDA that the driver takes, ``major.minor``."""


class WhileNode(NamedTuple):
    """A graph of one WHILE node that is not launchable yet, and what its body is recorded into."""

    graph: Any
    """Owns the node and the body."""
    handle: int
    """What device code sets: 0 ends the loop, anything else runs the body again."""
    body: Any


def probe_driver() -> str | None:
    """Why no GPU can be used, in a clause, or None where the driver finds one. Loads the driver's library alone."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
        status, count = driver.cuInit(0), ctypes.c_int(0)
        status = status or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return f"the driver's library {DRIVER_LIBRARY} is not on this machine"
    if status:
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return None if count.value else "the NVIDIA driver finds no GPU"


def require_gpu() -> None:
    """Check that there is a GPU.

    Raises:
        GpuError: there is none; one sentence that says why.
    """
    if reason := probe_driver():
        raise GpuError(f"this needs an NVIDIA GPU, and {reason}; {ADVICE}")


def open_cuda(device: int = 0) -> Cuda:
    """CUDA on a device of this machine.

    Raises:
        GpuError: no GPU.
        MissingExtraError: cuda-python is not installed.
    """
    require_gpu()
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise MissingExtraError("cuda-python", extra="tensorrt") from None
    cuda = Cuda(runtime)
    cuda.use(device)
    return cuda


def version_text(number: int) -> str:
    """``12.8`` of 12080, as CUDA numbers its versions."""
    return f"{number // 1000}.{number % 1000 // 10}"


class Cuda:
    """Checked calls. Addresses and handles are integers or the bindings' own; sizes are bytes.

    Raises:
        EngineError: of every method, with CUDA's own name and words for what went wrong.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def use(self, device: int) -> None:
        self._call("cudaSetDevice", device)

    def facts(self, device: int = 0) -> GpuFacts:
        properties = self._call("cudaGetDeviceProperties", device)
        name = properties.name
        return GpuFacts(
            name=name.decode() if isinstance(name, bytes) else str(name),
            compute_capability=f"{properties.major}.{properties.minor}",
            memory=int(properties.totalGlobalMem),
            driver=version_text(self._call("cudaDriverGetVersion")),
        )

    def versions(self) -> tuple[int, int]:
        """The newest CUDA that the driver takes, and the runtime's own; 12040 is 12.4."""
        return int(self._call("cudaDriverGetVersion")), int(self._call("cudaRuntimeGetVersion"))

    def allocate(self, size: int) -> int:
        """Address of device memory; not cleared."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """Address of page-locked host memory, which copies reach without staging."""
        return int(self._call("cudaMallocHost", size))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def clear(self, address: int, size: int, stream: Any) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: Any) -> None:
        """Copy in the order of the stream; done when the stream is synchronized."""
        kind = getattr(self.runtime.cudaMemcpyKind, _KINDS[direction])
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def make_stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def make_event(self) -> Any:
        """A mark that a stream can carry; it takes no time, so that it costs none."""
        return self._call("cudaEventCreateWithFlags", self.runtime.cudaEventDisableTiming)

    def make_clock(self) -> Any:
        """A mark that takes the time when a stream comes to it: for measuring."""
        return self._call("cudaEventCreate")

    def seconds_between(self, first: Any, last: Any) -> float:
        """Of the device, from one clock's mark to another's; both must have been waited for."""
        return float(self._call("cudaEventElapsedTime", first, last)) / 1e3

    def mark(self, event: Any, stream: Any) -> None:
        """Put an event behind everything that a stream was given so far."""
        self._call("cudaEventRecord", event, stream)

    def wait_for(self, event: Any) -> None:
        """Wait until a stream has come to where the event was last put; what was enqueued later may still run."""
        self._call("cudaEventSynchronize", event)

    def destroy_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    @contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        """Record what the block enqueues instead of running it; the list holds the launchable graph when it ends."""
        captured: list[Any] = []
        self._call("cudaStreamBeginCapture", stream, self._capture_mode)
        try:
            yield captured
        except BaseException:
            self.runtime.cudaStreamEndCapture(stream)  # the stream must leave capture, whatever became of it
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            captured.append(self.instantiate(graph))
        finally:
            self.discard(graph)

    @contextmanager
    def capture_into(self, stream: Any, graph: Any) -> Iterator[None]:
        """Record what the block enqueues into a graph that is there already, and whose owner discards it."""
        self._call("cudaStreamBeginCaptureToGraph", stream, graph, [], [], 0, self._capture_mode)
        try:
            yield
        except BaseException:
            self.runtime.cudaStreamEndCapture(stream)
            raise
        self._call("cudaStreamEndCapture", stream)

    @property
    def _capture_mode(self) -> Any:
        return self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def make_while(self) -> WhileNode:
        """A graph of one WHILE node, whose handle is 1 at every launch; its owner discards the graph."""
        runtime, graph = self.runtime, self._call("cudaGraphCreate", 0)
        try:
            at_launch = int(runtime.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault)
            handle = self._call("cudaGraphConditionalHandleCreate", graph, 1, at_launch)
            node = runtime.cudaGraphNodeParams()
            node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
            node.conditional.handle = handle
            node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
            node.conditional.size = 1
            takes_edges = "cudaGraphAddNode" if self.versions()[1] >= CUDA_13 else "cudaGraphAddNode_v2"
            self._call(takes_edges, graph, [], [], 0, node)
            return WhileNode(graph, int(handle), node.conditional.phGraph_out[0])
        except BaseException:
            self.discard(graph)
            raise

    def node_kinds(self, graph: Any) -> set[str]:
        """What kinds of nodes a graph holds, those of its child graphs included: ``Kernel``, ``Memcpy``, ``Host``..."""
        kinds: set[str] = set()
        _, count = self._call("cudaGraphGetNodes", graph)
        nodes, _ = self._call("cudaGraphGetNodes", graph, count) if count else ((), 0)
        for node in nodes:
            kind = self._call("cudaGraphNodeGetType", node)
            kinds.add(kind.name.removeprefix(_NODE_KIND))
            if kind == self.runtime.cudaGraphNodeType.cudaGraphNodeTypeGraph:
                kinds |= self.node_kinds(self._call("cudaGraphChildGraphNodeGetGraph", node))
        return kinds

    def instantiate(self, graph: Any) -> Any:
        """The launchable form of a graph, which needs the graph no more."""
        return self._call("cudaGraphInstantiate", graph, 0)

    def discard(self, graph: Any) -> None:
        """Free a graph that is not launchable, and the bodies of its nodes."""
        self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function gives beside its error code: nothing, one value, or a tuple of them."""
        code, *values = getattr(self.runtime, name)(*arguments)
        if code != self.runtime.cudaError_t.cudaSuccess:
            raise EngineError(f"{name} failed: {self._describe(code)}")
        return values[0] if len(values) == 1 else tuple(values)

    def _describe(self, code: Any) -> str:
        texts = [getattr(self.runtime, name)(code)[1] for name in ("cudaGetErrorName", "cudaGetErrorString")]
        return ", ".join(text.decode() if isinstance(text, bytes) else str(text) for text in texts)
