"""The calls of the CUDA runtime that engines and plans need, each checked, and the facts about the GPU.

This wraps ``cuda.bindings.runtime`` (cuda-python 12.8 or newer), which needs no CUDA toolkit. It does not depend on
TensorRT. It allocates nothing by itself, and callers free what they allocate. If there is no GPU, an error says so in
one sentence. This happens before any library is loaded that would crash there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any, Literal, NamedTuple

from cllm_export.errors import EngineError, GpuError
from cllm_export.extras import missing_extra

DRIVER_LIBRARY = "libcuda.so.1"
ADVICE = "see what this machine has with: cllm-export doctor"
Direction = Literal["to device", "to host", "on device"]

CUDA_13 = 13000
"""From this version of the runtime on, ``cudaGraphAddNode`` of the bindings also takes edge data."""
_NODE_KIND = "cudaGraphNodeType"

_KINDS = {
    "to device": "cudaMemcpyHostToDevice",
    "to host": "cudaMemcpyDeviceToHost",
    "on device": "cudaMemcpyDeviceToDevice",
}


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """The GPU in use, as its driver describes it."""

    name: str
    compute_capability: str
    """``major.minor``."""
    memory: int
    """Bytes. A Jetson shares this memory with the CPU."""
    driver: str
    """The newest CUDA version that the driver supports, ``major.minor``."""


class WhileNode(NamedTuple):
    """A graph of one WHILE node, not launchable yet, and the graph that its body is recorded into."""

    graph: Any
    """Owns the node and the body."""
    handle: int
    """Device code sets the value of this handle: 0 ends the loop, any other value runs the body again."""
    body: Any


def probe_driver() -> str | None:
    """The reason why no GPU can be used, as a clause, or None if there is one. Loads only the driver's library."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
        status, count = driver.cuInit(0), ctypes.c_int(0)
        status = status or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return f"the driver's library {DRIVER_LIBRARY} is not on this machine"
    if status:
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return None if count.value else "the NVIDIA driver finds no GPU"


def describe_gpu(device: int = 0) -> dict[str, Any]:
    """Name of a GPU and the newest CUDA version of its driver. Without a GPU both are None. Needs no cuda-python."""
    name, version, handle = ctypes.create_string_buffer(256), ctypes.c_int(0), ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
        status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device)
        status = (
            status
            or driver.cuDeviceGetName(name, len(name), handle)
            or driver.cuDriverGetVersion(ctypes.byref(version))
        )
    except (OSError, AttributeError):
        status = 1
    return (
        {"device": None, "driver": None}
        if status
        else {"device": name.value.decode(), "driver": version_text(version.value)}
    )


KERNEL_LIBRARIES = ("nvidia-cublas", "nvidia-cudnn", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc")
"""How the names of packages begin whose kernels ONNX Runtime's CUDA provider runs."""
KERNEL_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Variables of the environment by which NVIDIA's libraries choose kernels."""


def describe_cuda() -> dict[str, Any]:
    """What kernels on a GPU depend on besides it: installed packages of NVIDIA with versions, and the environment."""
    names = {(found.metadata["Name"] or "").lower().replace("_", "-"): found.version for found in distributions()}
    return {
        "libraries": {name: names[name] for name in sorted(names) if name.startswith(KERNEL_LIBRARIES)},
        "environment": {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ},
    }


def require_gpu() -> None:
    """Check that there is a GPU.

    Raises:
        GpuError: there is none. The message is one sentence that says why.
    """
    if reason := probe_driver():
        raise GpuError(f"this needs an NVIDIA GPU, and {reason}; {ADVICE}")


def open_cuda(device: int = 0, *, extra: str = "tensorrt") -> Cuda:
    """CUDA on a device of this machine.

    Raises:
        GpuError: there is no GPU.
        MissingExtraError: cuda-python is not installed.
    """
    require_gpu()
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise missing_extra("cuda-python", extra=extra) from None
    cuda = Cuda(runtime)
    cuda.use(device)
    return cuda


def version_text(number: int) -> str:
    """A CUDA version number as text: ``12.8`` for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


class Cuda:
    """Checked calls. Addresses and handles are integers or types of the bindings. Sizes are bytes.

    Raises:
        EngineError: any method failed. The message has CUDA's name and description of the error.
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
        """The newest CUDA version that the driver supports, and the runtime's own version. 12040 is 12.4."""
        return int(self._call("cudaDriverGetVersion")), int(self._call("cudaRuntimeGetVersion"))

    def allocate(self, size: int) -> int:
        """Address of new device memory, not cleared."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """Address of new page-locked host memory. Copies need no staging buffer for it."""
        return int(self._call("cudaMallocHost", size))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def clear(self, address: int, size: int, stream: Any) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def copy(self, target: int, source: int, size: int, direction: Direction, stream: Any) -> None:
        """Enqueue a copy on the stream. It is done when the stream is synchronized."""
        kind = getattr(self.runtime.cudaMemcpyKind, _KINDS[direction])
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def make_stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def make_event(self) -> Any:
        """An event without timing, which makes it cheap."""
        return self._call("cudaEventCreateWithFlags", self.runtime.cudaEventDisableTiming)

    def make_clock(self) -> Any:
        """An event with timing, for measurements: it records when a stream reaches it."""
        return self._call("cudaEventCreate")

    def seconds_between(self, first: Any, last: Any) -> float:
        """Device seconds between two clocks of ``make_clock``. Wait for both first."""
        return float(self._call("cudaEventElapsedTime", first, last)) / 1e3

    def mark(self, event: Any, stream: Any) -> None:
        """Enqueue an event behind all work that the stream has so far."""
        self._call("cudaEventRecord", event, stream)

    def wait_for(self, event: Any) -> None:
        """Wait until the stream has reached the event's last mark. Work that was enqueued later may still run."""
        self._call("cudaEventSynchronize", event)

    def destroy_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    @contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        """Record what the ``with`` enqueues, without running it. The list gets the launchable graph at its end."""
        captured: list[Any] = []
        self._call("cudaStreamBeginCapture", stream, self._capture_mode)
        try:
            yield captured
        except BaseException:
            self.runtime.cudaStreamEndCapture(stream)  # the stream must leave capture mode in any case
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            captured.append(self.instantiate(graph))
        finally:
            self.discard(graph)

    @contextmanager
    def capture_into(self, stream: Any, graph: Any) -> Iterator[None]:
        """Record what the ``with`` block enqueues into an existing graph. The graph's owner discards it."""
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
        """A graph of one WHILE node. Its handle is 1 at every launch. The caller discards the graph."""
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
        """The kinds of nodes in a graph and its child graphs: ``Kernel``, ``Memcpy``, ``Host`` and so on."""
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
        """The launchable form of a graph. The graph itself is no longer needed then."""
        return self._call("cudaGraphInstantiate", graph, 0)

    def discard(self, graph: Any) -> None:
        """Free a graph that is not launchable, and the bodies of its nodes."""
        self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function and check its error code. Returns its other values: an empty tuple, one value, or a tuple."""
        code, *values = getattr(self.runtime, name)(*arguments)
        if code != self.runtime.cudaError_t.cudaSuccess:
            raise EngineError(f"{name} failed: {self._describe(code)}")
        return values[0] if len(values) == 1 else tuple(values)

    def _describe(self, code: Any) -> str:
        texts = [getattr(self.runtime, name)(code)[1] for name in ("cudaGetErrorName", "cudaGetErrorString")]
        return ", ".join(text.decode() if isinstance(text, bytes) else str(text) for text in texts)
