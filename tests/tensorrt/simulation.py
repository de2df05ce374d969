"""A GPU in host memory: what stands behind the doubles, so that plans and engines run and give real tokens.

Device memory is host memory with bounds, a stream is a queue that runs when it is waited for (or at once, where the
device is to be ahead of the host), a captured graph is the list of what was enqueued. A plan holds the parsed graph,
and running it is ONNX Runtime on the CPU over the addresses that the context was given. It is far from a GPU in time
and arithmetic, and strict where a GPU is silent: memory that is not there, shapes outside a profile, outputs read too
early and caches apart all fail.
"""

from __future__ import annotations

import base64
import ctypes
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from cllm_export.runtime.engines.cuda import Cuda
from cllm_export.tensorrt.library import TENSORRT as DATA_CENTRE
from cllm_export.tensorrt.library import TENSORRT_RTX, Gpu, Library
from tests.tensorrt.doubles import CudaDouble, Nonconforming, TensorRtDouble, describe, describe_rtx
from tests.tensorrt.install import CUDA, TENSORRT

MEMORY = 1 << 32
DTYPES = {"INT64": np.int64, "FLOAT": np.float32, "HALF": np.float16}
NAME = "Simulated GPU"
Thunk = Callable[[], None]
ENDLESS = 10_000
"""Runs of a WHILE node's body after which it is taken to have no end."""
IN_A_BODY = {"Kernel", "Empty", "Memcpy", "Memset", "Graph", "Conditional"}
"""What CUDA takes in the body of a conditional node."""


class Node(NamedTuple):
    """Of a graph: what it is, what it does, and the graph inside it."""

    kind: str
    run: Thunk
    inner: int | None = None


@dataclass
class Marks:
    """Of an event: how often it was recorded, where last, how far that stream has come, and of a clock, when."""

    put: int = 0
    reached: int = 0
    stream: int = 0
    is_clock: bool = False
    time: float = 0.0


class HostMemory(bytes):
    """What TensorRT serializes into."""

    @property
    def nbytes(self) -> int:
        return len(self)


class Handle:
    """A stream or graph: an object of the bindings', of which TensorRT takes the number alone."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class SimulatedCuda:
    """Behaviour of ``cuda.bindings.runtime``. The parameters' names are the bindings' own."""

    def __init__(self, name: str = NAME, capability: tuple[int, int] = (9, 0), driver: int = 13000) -> None:
        self.name, self.capability, self.driver = name, capability, driver
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.queues: dict[int, list[Thunk]] = {}
        self.captures: dict[int, list[Node]] = {}
        self.graphs: dict[int, list[Node]] = {}
        self.captured_into: dict[int, Handle] = {}
        self.events: dict[int, Marks] = {}
        self.is_ahead = False
        """Whether a stream runs what it is given at once; else when somebody waits, and no further than he waits for.
        A device is somewhere between, so that what is right in both is right."""
        self.nodes: dict[int, Node] = {}
        """By handle, those that were asked about."""
        self.bodies: dict[int, list[int]] = {}
        """Graph -> the bodies that it owns."""
        self.conditions: dict[int, list[int]] = {}
        """Handle of a conditional node -> (its graph, its value at launch, its value)."""
        self.left_behind: list[int] = []
        """Of each wait for an event, what the stream still had to do when it was over."""
        self.body_runs = 0
        self.runtime_version = 0
        self.broken: set[str] = set()
        """``while``: kernels are such as CUDA takes in no WHILE node, though nothing shows it before."""
        self.bytes_copied = 0
        self.launches = 0
        self._last = 0

    @property
    def live_bytes(self) -> int:
        """Of device memory that nobody has freed."""
        return sum(len(each) for each in self.device.values())

    def is_empty(self) -> bool:
        """Whether everything that was made is gone."""
        return not (self.device or self.host or self.queues or self.captures or self.graphs or self.events)

    def require_device(self, address: int, size: int) -> None:
        for start, memory in self.device.items():
            if start <= address and address + size <= start + len(memory):
                return
        raise Nonconforming(f"{size} bytes at {address:#x} are not in live device memory")

    def enqueue(self, stream: Any, thunk: Thunk, kind: str = "Kernel", inner: int | None = None) -> None:
        if int(stream) in self.captures:
            self.captures[int(stream)].append(Node(kind, thunk, inner))
            return
        self.queues[int(stream)].append(thunk)
        if self.is_ahead:
            self._drain(int(stream))

    def _drain(self, stream: int) -> None:
        queue = self.queues[stream]
        while queue:
            queue.pop(0)()

    def _take(self, owner: dict[int, Any], what: str, handle: Any) -> Any:
        if int(handle) not in owner:
            raise Nonconforming(f"there is no {what} {int(handle):#x}")
        return owner.pop(int(handle))

    def _handle(self) -> Handle:
        self._last += 1
        return Handle(self._last)

    def cudaSetDevice(self, cuda: CudaDouble, device: int) -> Any:
        return None if device == 0 else cuda.cudaError_t.cudaErrorInvalidDevice

    def cudaGetDeviceProperties(self, cuda: CudaDouble, device: int) -> Any:
        major, minor = self.capability
        name = self.name.encode()
        return cuda.structure("cudaDeviceProp", name=name, major=major, minor=minor, totalGlobalMem=MEMORY)

    def cudaDriverGetVersion(self, cuda: CudaDouble) -> int:
        return self.driver

    def cudaRuntimeGetVersion(self, cuda: CudaDouble) -> int:
        major, minor, *_ = map(int, cuda.version.split("."))
        return self.runtime_version or major * 1000 + minor * 10

    def cudaMemGetInfo(self, cuda: CudaDouble) -> tuple[int, int]:
        return MEMORY - self.live_bytes, MEMORY

    def cudaGetErrorName(self, cuda: CudaDouble, error: Any) -> bytes:
        return error.name.encode()

    def cudaGetErrorString(self, cuda: CudaDouble, error: Any) -> bytes:
        return b"as simulated"

    def cudaMalloc(self, cuda: CudaDouble, size: int) -> Any:
        if size > MEMORY - self.live_bytes:
            return cuda.cudaError_t.cudaErrorMemoryAllocation
        return self._allocate(self.device, size)

    def cudaMallocHost(self, cuda: CudaDouble, size: int) -> int:
        return self._allocate(self.host, size)

    def _allocate(self, owner: dict[int, Any], size: int) -> int:
        if self.captures:
            raise Nonconforming("memory was allocated while a stream captures")
        memory = (ctypes.c_uint8 * size).from_buffer(bytearray(b"\xff" * size))  # NaN, not zero by luck
        address = ctypes.addressof(memory)
        owner[address] = memory
        return address

    def cudaFree(self, cuda: CudaDouble, devPtr: int) -> None:
        self._take(self.device, "device memory", devPtr)

    def cudaFreeHost(self, cuda: CudaDouble, ptr: int) -> None:
        self._take(self.host, "host memory", ptr)

    def cudaMemsetAsync(self, cuda: CudaDouble, devPtr: int, value: int, count: int, stream: Any) -> None:
        self.require_device(devPtr, count)
        self.enqueue(stream, lambda: ctypes.memset(devPtr, value, count), "Memset")

    def cudaMemcpyAsync(self, cuda: CudaDouble, dst: int, src: int, count: int, kind: Any, stream: Any) -> None:
        if kind == cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            self._copy_on_device(dst, src, count, stream)
            return
        to_device = kind == cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        device, host = (dst, src) if to_device else (src, dst)
        if int(stream) in self.captures and host not in self.host:
            raise Nonconforming("a captured copy must be of page-locked memory")

        def run() -> None:
            self.require_device(device, count)
            self.bytes_copied += count
            ctypes.memmove(dst, src, count)

        self.enqueue(stream, run, "Memcpy")

    def _copy_on_device(self, target: int, source: int, count: int, stream: Any) -> None:
        def run() -> None:
            self.require_device(target, count)
            self.require_device(source, count)
            ctypes.memmove(target, source, count)

        self.enqueue(stream, run, "Memcpy")

    def cudaStreamCreateWithFlags(self, cuda: CudaDouble, flags: int) -> Handle:
        if flags != cuda.cudaStreamNonBlocking:
            raise Nonconforming("a stream that waits for the default stream cannot be captured beside others")
        handle = self._handle()
        self.queues[int(handle)] = []
        return handle

    def cudaStreamSynchronize(self, cuda: CudaDouble, stream: Any) -> None:
        if int(stream) in self.captures:
            raise Nonconforming("a capturing stream was synchronized")
        self._drain(int(stream))

    def cudaStreamDestroy(self, cuda: CudaDouble, stream: Any) -> None:
        self._take(self.queues, "stream", stream)

    def cudaEventCreateWithFlags(self, cuda: CudaDouble, flags: int) -> Handle:
        if flags != cuda.cudaEventDisableTiming:
            raise Nonconforming("an event that takes the time costs it")
        handle = self._handle()
        self.events[int(handle)] = Marks()
        return handle

    def cudaEventCreate(self, cuda: CudaDouble) -> Handle:
        handle = self._handle()
        self.events[int(handle)] = Marks(is_clock=True)
        return handle

    def cudaEventElapsedTime(self, cuda: CudaDouble, start: Any, end: Any) -> Any:
        first, last = self.events[int(start)], self.events[int(end)]
        if not (first.is_clock and last.is_clock and first.put and last.put):
            return cuda.cudaError_t.cudaErrorInvalidResourceHandle
        if first.reached < first.put or last.reached < last.put:
            return cuda.cudaError_t.cudaErrorNotReady
        return (last.time - first.time) * 1e3

    def cudaEventRecord(self, cuda: CudaDouble, event: Any, stream: Any) -> None:
        marks = self.events[int(event)]
        if int(stream) in self.captures:
            raise Nonconforming("an event of a capture cannot be waited for")
        marks.put += 1
        marks.stream = int(stream)

        def run(number: int = marks.put) -> None:
            marks.reached, marks.time = number, perf_counter()

        self.enqueue(stream, run, "EventRecord")

    def cudaEventSynchronize(self, cuda: CudaDouble, event: Any) -> None:
        marks = self.events[int(event)]
        if not marks.put:
            raise Nonconforming("an event was waited for that nobody recorded: CUDA does not wait then")
        while marks.reached < marks.put:
            self.queues[marks.stream].pop(0)()
        self.left_behind.append(len(self.queues[marks.stream]))

    def cudaEventDestroy(self, cuda: CudaDouble, event: Any) -> None:
        marks = self._take(self.events, "event", event)
        if marks.reached < marks.put:
            raise Nonconforming("an event was destroyed that the stream has not come to")

    def cudaStreamBeginCapture(self, cuda: CudaDouble, stream: Any, mode: Any) -> None:
        self.captures[int(stream)] = []

    def cudaStreamBeginCaptureToGraph(
        self,
        cuda: CudaDouble,
        stream: Any,
        graph: Any,
        dependencies: Any,
        dependencyData: Any,
        numDependencies: int,
        mode: Any,
    ) -> None:
        if len(dependencies) != numDependencies:
            raise Nonconforming(f"{numDependencies} dependencies, got {len(dependencies)}")
        self.captures[int(stream)] = self.graphs[int(graph)]
        self.captured_into[int(stream)] = graph

    def cudaStreamEndCapture(self, cuda: CudaDouble, stream: Any) -> Handle:
        if int(stream) in self.captured_into:
            self._take(self.captures, "capture on stream", stream)
            return self.captured_into.pop(int(stream))
        handle = self._handle()
        self.graphs[int(handle)] = self._take(self.captures, "capture on stream", stream)
        return handle

    def cudaGraphCreate(self, cuda: CudaDouble, flags: int) -> Handle:
        handle = self._handle()
        self.graphs[int(handle)] = []
        return handle

    def cudaGraphConditionalHandleCreate(
        self, cuda: CudaDouble, graph: Any, defaultLaunchValue: int, flags: int
    ) -> Handle:
        if flags != cuda.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault:
            raise Nonconforming("the handle's value at launch is undefined")
        handle = self._handle()
        self.conditions[int(handle)] = [int(graph), defaultLaunchValue, defaultLaunchValue]
        return handle

    def cudaGraphAddNode_v2(
        self,
        cuda: CudaDouble,
        graph: Any,
        nodeParams: Any,
        **dependencies: Any,
    ) -> Handle:
        return self._add_while(cuda, graph, nodeParams)

    def cudaGraphAddNode(self, cuda: CudaDouble, graph: Any, nodeParams: Any, **dependencies: Any) -> Handle:
        return self._add_while(cuda, graph, nodeParams)

    def _add_while(self, cuda: CudaDouble, graph: Any, params: Any) -> Any:
        node, handle = params.conditional, int(params.conditional.handle)
        if params.type is not cuda.cudaGraphNodeType.cudaGraphNodeTypeConditional or node.size != 1:
            raise Nonconforming("only WHILE nodes of one body are simulated")
        if node.type is not cuda.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile:
            raise Nonconforming(f"a WHILE node is wanted, got {node.type!r}")
        if self.conditions[handle][0] != int(graph):
            raise Nonconforming("the handle is of another graph")
        body = self._handle()
        self.graphs[int(body)] = []
        self.bodies.setdefault(int(graph), []).append(int(body))
        node.phGraph_out = [body]
        content = self.graphs[int(body)]
        self.graphs[int(graph)].append(Node("Conditional", lambda: self._repeat(handle, content), int(body)))
        return self._handle()

    def _repeat(self, handle: int, body: list[Node]) -> None:
        """A launch gives the handle its default, and the body runs while it is not 0."""
        _, self.conditions[handle][2], _ = self.conditions[handle]
        for _ in range(ENDLESS):
            if not self.conditions[handle][2]:
                return
            self.body_runs += 1
            for node in body:
                node.run()
        raise Nonconforming("a WHILE node does not end")

    def set_conditional(self, handle: int, value: int) -> None:
        """What device code calls."""
        self.conditions[handle][2] = value

    def cudaGraphGetNodes(self, cuda: CudaDouble, graph: Any, numNodes: int = 0) -> tuple[list[Handle], int]:
        content = self.graphs[int(graph)]
        handles = [self._handle() for _ in content[:numNodes]]
        self.nodes |= {int(handle): node for handle, node in zip(handles, content, strict=False)}
        return handles, numNodes or len(content)

    def cudaGraphNodeGetType(self, cuda: CudaDouble, node: Any) -> Any:
        return getattr(cuda.cudaGraphNodeType, f"cudaGraphNodeType{self.nodes[int(node)].kind}")

    def cudaGraphChildGraphNodeGetGraph(self, cuda: CudaDouble, node: Any) -> Any:
        return Handle(int(self.nodes[int(node)].inner or 0))

    def cudaGraphInstantiate(self, cuda: CudaDouble, graph: Any, flags: int) -> Any:
        for body in self.bodies.get(int(graph), ()):
            if "while" in self.broken:
                return cuda.cudaError_t.cudaErrorNotSupported
            if wrong := {node.kind for node in self.graphs[body]} - IN_A_BODY:
                raise Nonconforming(f"no body may hold {sorted(wrong)[0]}")
        handle = self._handle()
        self.graphs[int(handle)] = list(self.graphs[int(graph)])
        return handle

    def cudaGraphLaunch(self, cuda: CudaDouble, graphExec: Any, stream: Any) -> None:
        self.launches += 1
        for node in self.graphs[int(graphExec)]:
            self.enqueue(stream, node.run, node.kind, node.inner)

    def cudaGraphDestroy(self, cuda: CudaDouble, graph: Any) -> None:
        if any(int(graph) in owned for owned in self.bodies.values()):
            raise Nonconforming("a body is its node's own")
        self._take(self.graphs, "graph", graph)
        for body in self.bodies.pop(int(graph), ()):
            del self.graphs[body]

    def cudaGraphExecDestroy(self, cuda: CudaDouble, graphExec: Any) -> None:
        self._take(self.graphs, "executable graph", graphExec)


SET_CONDITIONAL = ctypes.CFUNCTYPE(None, ctypes.c_ulonglong, ctypes.c_uint)


class SimulatedDriver:
    """Behaviour of ``cuda.bindings.driver``: kernels are the libraries that ``SimulatedNvrtc`` made of their source."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda = cuda
        self.modules: dict[int, Any] = {}
        self._set_conditional = SET_CONDITIONAL(cuda.set_conditional)

    def cuModuleLoadData(self, driver: CudaDouble, image: bytes) -> Handle:
        handle = self.cuda._handle()
        library = self.modules[int(handle)] = ctypes.CDLL(image.decode())
        if hasattr(library, "cudaGraphSetConditional"):
            ctypes.c_void_p.in_dll(library, "cudaGraphSetConditional").value = ctypes.cast(
                self._set_conditional, ctypes.c_void_p
            ).value
        return handle

    def cuModuleGetFunction(self, driver: CudaDouble, hmod: Any, name: bytes) -> Any:
        return getattr(self.modules[int(hmod)], name.decode())

    def cuModuleUnload(self, driver: CudaDouble, hmod: Any) -> None:
        del self.modules[int(hmod)]

    def cuLaunchKernel(
        self, driver: CudaDouble, f: Any, hStream: int, kernelParams: Any, extra: int, **grid: int
    ) -> None:
        if grid.pop("sharedMemBytes") or set(grid.values()) - {1, grid["blockDimX"]}:
            raise Nonconforming(f"the simulation launches one block along x, got {grid}")
        values, kinds = kernelParams
        for value, kind in zip(values, kinds, strict=True):
            if kind is ctypes.c_void_p:
                self.cuda.require_device(value, 1)

        def run() -> None:
            for thread in range(grid["blockDimX"]):
                f(ctypes.c_int(thread), *(kind(value) for value, kind in zip(values, kinds, strict=True)))

        self.cuda.enqueue(hStream, run)


class SimulatedNvrtc:
    """Behaviour of ``cuda.bindings.nvrtc``: the kernel's own source, compiled for the CPU; the image is a path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options: list[bytes] = []
        self.source = b""
        self.broken: set[bytes] = set()
        """Names of kernels that shall not compile."""
        self._compiled = 0

    def nvrtcCreateProgram(
        self, nvrtc: CudaDouble, src: bytes, name: bytes, numHeaders: int, headers: Any, includeNames: Any
    ) -> Handle:
        self.source = src
        return Handle(1)

    def nvrtcCompileProgram(self, nvrtc: CudaDouble, prog: Any, numOptions: int, options: list[bytes]) -> Any:
        self.options = options
        self._compiled += 1  # a library is loaded once by its path
        compiles = not any(name in self.source for name in self.broken) and compile_for_cpu(self.source, self._path)
        return None if compiles else nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION

    @property
    def _path(self) -> Path:
        return self.directory / f"kernel{self._compiled}.so"

    def nvrtcGetProgramLogSize(self, nvrtc: CudaDouble, prog: Any) -> int:
        return 8

    def nvrtcGetProgramLog(self, nvrtc: CudaDouble, prog: Any, log: bytes) -> None:
        ctypes.memmove(log, b"no such ", 8)

    def nvrtcGetCUBINSize(self, nvrtc: CudaDouble, prog: Any) -> int:
        return len(str(self._path))

    def nvrtcGetCUBIN(self, nvrtc: CudaDouble, prog: Any, cubin: bytes) -> None:
        ctypes.memmove(cubin, str(self._path).encode(), len(cubin))

    def nvrtcDestroyProgram(self, nvrtc: CudaDouble, prog: Any) -> None:
        return None


def compile_for_cpu(source: bytes, path: Path) -> bool:
    """Make a library of a kernel whose first parameter is the thread's number; False where it does not compile."""
    words = re.sub(
        r'extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional\(.*\);',
        "void (*cudaGraphSetConditional)(unsigned long long, unsigned int);",
        source.decode(),
    )
    words = re.sub(r'extern "C" __global__ void (\w+)\(', r"void \1(int thread, ", words)
    words = re.sub(r"\)\n\{", ")\n{\n    threadIdx.x = thread;", words, count=1)
    places = "struct place { int x; };\nstatic struct place blockIdx = {0}, blockDim = {0}, threadIdx = {0};\n"
    words = places + words
    command = ["cc", "-shared", "-fPIC", "-Werror", "-x", "c", "-o", str(path), "-"]
    return subprocess.run(command, input=words.encode(), check=False).returncode == 0


class SimulatedTensorRt:
    """Behaviour of ``tensorrt``. ``broken`` holds what shall fail: parse, build, deserialize, execute, refit, alias.

    With ``host`` in it a forward holds a function of the host."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda = cuda
        self.broken: set[str] = set()
        self.module: Any = None
        self.executions = 0
        self._logger: Any = None

    def fails(self, what: str) -> bool:
        """Whether a step shall fail; then TensorRT's log says so first."""
        if what in self.broken:
            self._logger.log(self.module.ILogger.Severity.INFO, "of no interest")
            self._logger.log(self.module.ILogger.Severity.ERROR, f"[simulated] {what} failed")
        return what in self.broken

    # Building.

    def Builder_new(self, builder: Any, logger: Any) -> None:
        self._logger = logger

    def Builder_create_network(self, builder: Any, flags: int = 0) -> Any:
        typed = 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if not flags & typed:
            raise Nonconforming("the network is not strongly typed")
        return self.module.make("INetworkDefinition", tensors={"input": [], "output": []}, num_inputs=0, num_outputs=0)

    def OnnxParser_new(self, parser: Any, network: Any, logger: Any) -> None:
        parser._values["network"] = network

    def OnnxParser_parse_from_file(self, parser: Any, model: str) -> bool:
        import onnx

        return self._parse(parser, onnx.load(model))  # external data is read from the graph's own directory

    def OnnxParser_load_model_proto(self, parser: Any, model: bytes, path: str) -> bool:
        import onnx

        parser._values.update(loaded=onnx.load_from_string(model), directory=str(Path(path).parent))
        return True

    def OnnxParser_load_initializer(self, parser: Any, name: str, data: int, size: int) -> bool:
        tensors = {tensor.name: tensor for tensor in parser._values["loaded"].graph.initializer}
        stated = {entry.key: entry.value for entry in tensors[name].external_data}
        tensors[name].ClearField("external_data")
        tensors[name].data_location = 0
        tensors[name].raw_data = ctypes.string_at(data, size)
        return int(stated["length"]) == size

    def OnnxParser_parse_model_proto(self, parser: Any) -> bool:
        from onnx.external_data_helper import load_external_data_for_model

        load_external_data_for_model(parser._values["loaded"], parser._values["directory"])
        return self._parse(parser, parser._values["loaded"])

    def _parse(self, parser: Any, proto: Any) -> bool:
        if self.fails("parse"):
            parser._values["num_errors"] = 1
            return False
        network = parser._values["network"]
        for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
            network._values["tensors"][kind] = [
                self.module.make("ITensor", name=value.name, is_shape_tensor=value.name in self.broken)
                for value in values
            ]
            network._values[f"num_{kind}s"] = len(values)
        network._values["graph"] = base64.b64encode(proto.SerializeToString()).decode()
        return True

    def OnnxParser_get_error(self, parser: Any, index: int) -> str:
        return "a node that is not known"

    def INetworkDefinition_get_input(self, network: Any, index: int) -> Any:
        return network._values["tensors"]["input"][index]

    def INetworkDefinition_get_output(self, network: Any, index: int) -> Any:
        return network._values["tensors"]["output"][index]

    def INetworkDefinition_unmark_output(self, network: Any, tensor: Any) -> None:
        network._values["tensors"]["output"].remove(tensor)
        network._values["num_outputs"] -= 1

    def IOptimizationProfile_set_shape(self, profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        profile._values.setdefault("shapes", {})[input] = [list(min), list(opt), list(max)]

    def IBuilderConfig_add_optimization_profile(self, config: Any, profile: Any) -> int:
        profiles = config._values.setdefault("profiles", [])
        profiles.append(profile._values["shapes"])
        return len(profiles) - 1

    def IBuilderConfig_set_flag(self, config: Any, flag: Any) -> None:
        config._values.setdefault("set", []).append(flag.name)

    def IBuilderConfig_create_timing_cache(self, config: Any, serialized_timing_cache: bytes) -> Any:
        return self.module.make("ITimingCache", content=bytes(serialized_timing_cache))

    def IBuilderConfig_set_timing_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._values["content"].startswith(b"of another"):
            return False
        config._values["cache"] = cache
        return True

    def IBuilderConfig_get_timing_cache(self, config: Any) -> Any:
        return config._values["cache"]

    def ITimingCache_serialize(self, cache: Any) -> HostMemory:
        return HostMemory(cache._values["content"] + b"measured;")

    def Builder_build_serialized_network(self, builder: Any, network: Any, config: Any) -> HostMemory | None:
        if self.fails("build"):
            return None
        plan = {
            "graph": network._values["graph"],
            "outputs": [tensor.name for tensor in network._values["tensors"]["output"]],
            "profiles": config._values.get("profiles", []),
            "flags": config._values.get("set", []),
            "version": self.module.__version__,
        }
        return HostMemory(json.dumps(plan).encode())

    # Running.

    def Runtime_new(self, runtime: Any, logger: Any) -> None:
        self._logger = logger

    def Runtime_deserialize_cuda_engine(self, runtime: Any, serialized_engine: Any) -> Any:
        import onnxruntime

        if self.fails("deserialize"):
            return None
        plan = json.loads(bytes(serialized_engine))
        if "VERSION_COMPATIBLE" in plan["flags"] and not runtime._values.get("engine_host_code_allowed"):
            raise Nonconforming("a version-compatible plan needs engine_host_code_allowed")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its advice on updates in place is not about the simulation
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(base64.b64decode(plan["graph"]), options)
        inputs = {each.name: each for each in session.get_inputs()}
        outputs = {each.name: each for each in session.get_outputs() if each.name in plan["outputs"]}
        return self.module.make(
            "ICudaEngine",
            plan=plan,
            session=session,
            inputs=inputs,
            outputs=outputs,
            names=[*inputs, *outputs],
            num_io_tensors=len(inputs) + len(outputs),
            num_optimization_profiles=max(1, len(plan["profiles"])),
            has_weights="STRIP_PLAN" not in plan["flags"],
        )

    def Refitter_new(self, refitter: Any, engine: Any, logger: Any) -> None:
        refitter._values["engine"] = engine

    def OnnxParserRefitter_new(self, parser: Any, refitter: Any, logger: Any) -> None:
        parser._values["refitter"] = refitter

    def OnnxParserRefitter_refit_from_file(self, parser: Any, model: str) -> bool:
        parser._values["refitter"]._values["ready"] = Path(model).is_file()
        return not self.fails("refit")

    def OnnxParserRefitter_refit_model_proto(self, parser: Any) -> bool:
        parser._values["refitter"]._values["ready"] = True
        return not self.fails("refit")

    def Refitter_refit_cuda_engine(self, refitter: Any) -> bool:
        refitter._values["engine"]._values["has_weights"] = refitter._values["ready"]
        return True

    def Refitter_get_missing_weights(self, refitter: Any) -> list[str]:
        return ["a.weight"]

    def ICudaEngine_get_tensor_name(self, engine: Any, index: int) -> str:
        return engine._values["names"][index]

    def ICudaEngine_get_tensor_dtype(self, engine: Any, name: str) -> Any:
        known = {"tensor(int64)": "INT64", "tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
        values = engine._values["inputs"] | engine._values["outputs"]
        return getattr(self.module.DataType, known[values[name].type])

    def ICudaEngine_is_shape_inference_io(self, engine: Any, name: str) -> bool:
        return False

    def ICudaEngine_get_aliased_input_tensor(self, engine: Any, name: str) -> str:
        return name.replace("present_", "past_") if name.startswith("present_") and "alias" not in self.broken else ""

    def ICudaEngine_get_device_memory_size_for_profile_v2(self, engine: Any, profile_index: int) -> int:
        return 1024 * (profile_index + 1)

    def ICudaEngine_create_execution_context(self, engine: Any, strategy: Any) -> Any:
        if strategy is not self.module.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Nonconforming("a context would allocate scratch memory of its own")
        return self.module.make("IExecutionContext", engine=engine, addresses={}, shapes={}, profile=0, scratch=None)

    def IExecutionContext_set_device_memory(self, context: Any, memory: int, size: int) -> None:
        self.cuda.require_device(memory, size)
        context._values["scratch"] = (memory, size)

    def IExecutionContext_set_optimization_profile_async(
        self, context: Any, profile_index: int, stream_handle: int
    ) -> bool:
        context._values["profile"] = profile_index
        return profile_index < context._values["engine"].num_optimization_profiles

    def IExecutionContext_set_tensor_address(self, context: Any, name: str, memory: int) -> bool:
        context._values["addresses"][name] = memory
        return name in context._values["engine"]._values["names"]

    def IExecutionContext_set_input_shape(self, context: Any, name: str, shape: Any) -> bool:
        profiles = context._values["engine"]._values["plan"]["profiles"]
        least, _, largest = profiles[context._values["profile"]][name]
        context._values["shapes"][name] = tuple(shape)
        return all(low <= each <= high for low, each, high in zip(least, shape, largest, strict=True))

    def IExecutionContext_execute_async_v3(self, context: Any, stream_handle: int) -> bool:
        if self.fails("execute"):
            return False
        values, engine = dict(context._values), context._values["engine"]._values
        if not engine["has_weights"]:
            raise Nonconforming("a stripped plan was run before its weights were put in")
        if values["scratch"] is None or set(values["addresses"]) != set(engine["names"]):
            raise Nonconforming("a context was run without scratch memory or with tensors that have no address")
        for name in engine["outputs"]:
            past = name.replace("present_", "past_")
            if past != name and values["addresses"][name] != values["addresses"][past]:
                raise Nonconforming(f"{name} and {past} lie apart")
        addresses, shapes = dict(values["addresses"]), self._shapes(values["shapes"], engine)
        kind = "Host" if "host" in self.broken else "Kernel"
        self.cuda.enqueue(stream_handle, lambda: self._execute(engine, addresses, shapes), kind)
        return True

    def _shapes(self, given: dict[str, Any], engine: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        static = {
            name: tuple(value.shape)
            for name, value in engine["inputs"].items()
            if all(isinstance(dim, int) for dim in value.shape)
        }
        if missing := set(engine["inputs"]) - set(given) - set(static):
            raise Nonconforming(f"{sorted(missing)[0]} has no shape")
        return static | given

    def _execute(self, engine: dict[str, Any], addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        self.executions += 1
        fed = {name: self._view(addresses[name], shapes[name], value.type) for name, value in engine["inputs"].items()}
        names = list(engine["outputs"])
        for name, array in zip(names, engine["session"].run(names, fed), strict=True):
            self._view(addresses[name], array.shape, engine["outputs"][name].type)[...] = array

    def _view(self, address: int, shape: tuple[int, ...], kind: str) -> Any:
        dtype = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}[kind]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.cuda.require_device(address, size)
        content = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(content, dtype).reshape(shape)


class SimulatedGpu:
    """Everything behind one simulated GPU; ``gpu`` is what plans and engines take.

    Args:
        tensorrt: the version, of the library for data-centre cards; of the other there is the environment's alone.
    """

    def __init__(
        self, *, tensorrt: str = TENSORRT[-1], cuda: str = CUDA[-1], library: Library = DATA_CENTRE, **device: Any
    ) -> None:
        self.cuda = SimulatedCuda(**device)
        self.tensorrt = SimulatedTensorRt(self.cuda)
        described = describe_rtx() if library is TENSORRT_RTX else describe("tensorrt", tensorrt)
        self.trt = TensorRtDouble(described, self.tensorrt)
        self.tensorrt.module = self.trt
        modules = describe("cuda", cuda)
        self.runtime = CudaDouble(modules["runtime"], self.cuda)
        self.driver = CudaDouble(modules["driver"], SimulatedDriver(self.cuda))
        checked = Cuda(self.runtime)
        self.gpu = Gpu(tensorrt=self.trt, cuda=checked, facts=checked.facts(), library=library)

    def compiler(self, directory: Path, cuda: str = CUDA[-1]) -> tuple[CudaDouble, CudaDouble]:
        """``nvrtc`` and ``driver``, the former making libraries in a directory."""
        return CudaDouble(describe("cuda", cuda)["nvrtc"], SimulatedNvrtc(directory)), self.driver


def versions() -> Iterator[tuple[str, str]]:
    """Every TensorRT, with the oldest and the newest cuda-python in turn."""
    for index, version in enumerate(TENSORRT):
        yield version, CUDA[min(index, len(CUDA) - 1)]
