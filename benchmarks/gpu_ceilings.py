"""Measure a device's upper limits for ``gpu_forwards.py``: copies within its memory, and one large matrix product.

Both are probes: functions that measure once and return figures by name. They run in turn with the forwards whose
ceilings they are. The library that runs the forwards also runs the product, from one ONNX file for all libraries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from cllm_export.bundle.contract import OPSET, DType
from cllm_export.errors import EngineError
from cllm_export.runtime.engines.cuda import Cuda
from cllm_export.runtime.engines.onnxruntime import PROVIDERS, Device, element_type
from cllm_export.tensorrt.device_buffers import DeviceMemory
from cllm_export.tensorrt.graph import errors_of
from cllm_export.tensorrt.library import Gpu, Log

Probe = Callable[[], dict[str, float]]

COPY_BYTES = 256 << 20
SECONDS, LEAST, MOST = 0.05, 2, 50
"""Target duration of a probe in seconds, and the smallest and largest number of repeats."""
COPIES, PRODUCTS = 20, 10
IR_VERSION = 10


def repeats_for(seconds: float) -> int:
    """How often to repeat a function that takes this many seconds."""
    return max(LEAST, min(MOST, int(SECONDS / max(seconds, 1e-9))))


def device_seconds(cuda: Cuda, stream: Any, enqueue: Callable[[], object], repeats: int) -> float:
    """Device seconds per run of the work that a function enqueues, over several runs between two stream events."""
    clocks = [cuda.make_clock() for _ in range(2)]
    try:
        cuda.mark(clocks[0], stream)
        for _ in range(repeats):
            enqueue()
        cuda.mark(clocks[1], stream)
        cuda.wait_for(clocks[1])
        return cuda.seconds_between(*clocks) / repeats
    finally:
        cuda.synchronize(stream)
        for clock in clocks:
            cuda.destroy_event(clock)


def copy_on_device(cuda: Cuda, owned: ExitStack, size: int = COPY_BYTES) -> Probe:
    """Bytes read and written per second by a copy from one buffer of the device to another."""
    stream = cuda.make_stream()
    owned.callback(cuda.destroy_stream, stream)
    memory = DeviceMemory(cuda, owned)
    source, target = memory.device(size), memory.device(size)
    cuda.clear(source, size, stream)

    def measure() -> dict[str, float]:
        def enqueue() -> None:
            cuda.copy(target, source, size, "on device", stream)

        return {"rate": 2 * size / device_seconds(cuda, stream, enqueue, COPIES)}

    return measure


def copy_on_host(threads: int, size: int = COPY_BYTES) -> Probe:
    """Like ``copy_on_device``, but in the processor's memory, with as many threads as the engine has."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    bounds = [size * index // threads for index in range(threads + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    pool = ThreadPoolExecutor(threads)

    def measure() -> dict[str, float]:
        started = perf_counter()
        list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
        return {"rate": 2 * size / (perf_counter() - started)}

    return measure


def write_product(path: Path, dtype: DType, size: int) -> Path:
    """An ONNX file with one MatMul of two square matrices, a and b."""
    import onnx
    from onnx import helper

    kind = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]
    element = getattr(onnx.TensorProto, kind)
    a, b, c = (helper.make_tensor_value_info(name, element, [size, size]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    return path


def noise(size: int, dtype: DType) -> np.ndarray:
    """A square matrix of numbers from -1 to 1; bfloat16 as its bits. Zeros would save GPU power, and flatter it."""
    values = np.random.default_rng(0).uniform(-1, 1, (size, size)).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def rate_of(size: int, seconds: float) -> dict[str, float]:
    return {"rate": 2 * size**3 / seconds}


def multiply_on_ort(path: Path, dtype: DType, size: int, *, device: Device, threads: int) -> Probe:
    """Operations per second of the product with ONNX Runtime. A run ends when the device has finished.

    Raises:
        EngineError: ONNX Runtime has no such product on the device.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if device != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[device]])
        io = session.io_binding()
        for name in "abc":
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((size, size), element_type(dtype), device, 0)
            value.update_inplace(noise(size, dtype))
            bind = io.bind_ortvalue_output if name == "c" else io.bind_ortvalue_input
            bind(name, value)
        session.run_with_iobinding(io)
    except Exception as error:  # onnxruntime raises its own types, unrelated to each other
        raise EngineError(f"ONNX Runtime multiplies no {dtype} matrices on {device}: {error}") from error

    def measure() -> dict[str, float]:
        times = []
        for _ in range(LEAST if device == "cpu" else PRODUCTS):
            started = perf_counter()
            session.run_with_iobinding(io)
            times.append(perf_counter() - started)
        return rate_of(size, min(times))

    return measure


def multiply_on_tensorrt(path: Path, dtype: DType, size: int, *, gpu: Gpu, owned: ExitStack) -> Probe:
    """Operations per second of the product with TensorRT, between two events.

    Raises:
        EngineError: TensorRT cannot build or run the product.
    """
    cuda, stream = gpu.cuda, gpu.cuda.make_stream()
    owned.callback(cuda.destroy_stream, stream)
    log = Log(gpu.tensorrt)
    engine = _build(gpu.tensorrt, log, path)
    context = engine.create_execution_context(gpu.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)
    memory = DeviceMemory(cuda, owned)
    scratch = max(1, engine.get_device_memory_size_for_profile_v2(0))
    context.set_device_memory(memory.device(scratch), scratch)
    content = noise(size, dtype)
    for name in "abc":
        address = memory.device(content.nbytes)
        cuda.copy(address, content.ctypes.data, content.nbytes, "to device", stream)
        context.set_tensor_address(name, address)
    cuda.synchronize(stream)

    def enqueue() -> None:
        if not context.execute_async_v3(int(stream)):
            raise EngineError(log.explain("TensorRT failed in a matrix product"))

    return lambda: rate_of(size, device_seconds(cuda, stream, enqueue, PRODUCTS))


def _build(tensorrt: Any, log: Log, path: Path) -> Any:
    builder = tensorrt.Builder(log.logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(path)):
        raise EngineError(log.explain(f"TensorRT does not take a matrix product: {errors_of(parser)}"))
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # as in the build of plans
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(log.explain("TensorRT could not build a matrix product"))
    engine = tensorrt.Runtime(log.logger).deserialize_cuda_engine(serialized)
    if engine is None:
        raise EngineError(log.explain("TensorRT does not load a matrix product"))
    return engine
