"""The ONNX Runtime engine, on the CPU or on a CUDA device. On CUDA it has not run yet.

It has a session for each graph in use, and static buffers that are bound once for each shape. All sessions update one
KV cache in place.

On the CPU, sessions read and write numpy arrays directly. On a device, every buffer is a value there. The block is
copied in and the predictions are copied out. Cache and positions stay on the device. Logits are copied out only if
asked for.

With CUDA graphs, ONNX Runtime records each binding's forward and replays it: a graph has one set of shapes and
addresses, and so has a binding. To record, it runs a forward several times. This is harmless, since a forward writes
the same rows again. Prefill chunks have many lengths, so they are not recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cllm_export.bundle.contract import KV_DTYPE, LOGITS, Batch, DType, FixedShapes, cache_names, check_forward
from cllm_export.bundle.manifest import GREEDY_GRAPH, LOOKAHEAD_GRAPH, WEIGHTS_NAME, Bundle
from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, GpuError, OptionError
from cllm_export.extras import install_line, missing_extra, require_floors
from cllm_export.runtime.engines.base import EngineBase, Forward, KvRows
from cllm_export.runtime.engines.cuda import describe_cuda, describe_gpu, require_gpu
from cllm_export.runtime.engines.kv_cache import allocate, check_row_shape, graph_kv_length, kv_length_bucket
from cllm_export.runtime.engines.machine import (
    available_threads,
    describe_processor,
    onnxruntime_version,
    require_memory,
)
from cllm_export.runtime.engines.mapped_weights import MappedWeights
from cllm_export.runtime.engines.resident_memory import drop_file_pages, trim_heap

if TYPE_CHECKING:
    import onnxruntime


Device = Literal["cpu", "cuda"]

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

CACHE_RESIDENT_BYTES = 32 << 20
"""Weights up to this size stay in a CPU's last-level cache while decoding, unless something evicts them."""

SMALL_CHUNK, CHUNK = 16, 128
"""Tokens per prefill forward. A wide forward reads the weights less often, which pays if they come from memory. If they
stay in the CPU's cache, it gains nothing. It also evicts them, which slows about the next ten decode forwards. On the
demo model, 128 instead of 16 costs an autoregressive request 20 % of its decode, and saves the same time in prefill."""

QDQ_AS_WRITTEN = ("session.disable_quant_qdq", "1")
"""Session setting: dequantise and then multiply in fp32, as the graph says. The alternative is a fused kernel of signed
bytes. On x86 without VNNI, that kernel adds products in 16 bits and saturates silently. On a tiny model, half of the
logits moved by a tenth of their spread."""

SESSION_OPTIONS = {"graph_optimization_level": "ORT_ENABLE_ALL", **dict([QDQ_AS_WRITTEN])}
"""The options of every session that its kernels depend on, besides threads, which vary."""

ENABLE_GRAPHS = ("enable_cuda_graph", "1")
"""Option of the CUDA provider that enables CUDA graphs."""

GRAPH_ID = "gpu_graph_id"
"""Entry of a run's options: the id of the graph to record or replay. 0 is ONNX Runtime's own graph."""

NO_GRAPH = "-1"

ADVICE = "; it was asked for CUDA graphs: leave cuda_graphs out"
"""Added to errors of ONNX Runtime if CUDA graphs were enabled."""

COUNTS = ("num_committed", "write_index")

BFLOAT16 = 16
"""ONNX number of this dtype, which numpy does not have."""


class Buffer(Protocol):
    """A tensor that sessions are bound to. It is zeroed at first."""

    value: onnxruntime.OrtValue
    """A value over the tensor's memory."""

    def put(self, values: ArrayLike) -> None:
        """Fill the whole tensor."""
        ...

    def get(self) -> NDArray[Any]:
        """The whole tensor: its memory if the host can address it, else a copy."""
        ...

    def read_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        """Fill rows [K, rows, D] from a slot of a cache tensor [B, K, C, D]."""
        ...

    def write_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        """Put rows [K, rows, D] into a slot of a cache tensor [B, K, C, D]."""
        ...


class HostBuffer:
    """A numpy array that sessions read and write in place."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.value = bindable(array)

    def put(self, values: ArrayLike) -> None:
        self._array[...] = values

    def get(self) -> NDArray[Any]:
        return self._array

    def read_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        rows[...] = self._array[slot, :, start : start + rows.shape[1]]

    def write_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        self._array[slot, :, start : start + rows.shape[1]] = rows


class DeviceBuffer:
    """A value on a device, with copies to and from it. It also works on the device ``cpu``, for tests.

    ONNX Runtime cannot slice a value. But an output bound to an address is a value over the memory there. So rows are
    copied head by head, and nothing else is copied. In the same way bf16, which numpy does not have, is seen as its
    bits.

    Args:
        io: a binding of any session, to make such values with.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DType, *, device: Device, io: onnxruntime.IOBinding) -> None:
        import onnxruntime

        self._shape, self._io = shape, io
        self._dtype = host_dtype(dtype)
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type(dtype), device, 0)
        self._whole = self._view(0, shape)
        self.put(0)

    def put(self, values: ArrayLike) -> None:
        array = np.empty(self._shape, self._dtype)
        array[...] = values
        self._whole.update_inplace(array)

    def get(self) -> NDArray[Any]:
        array: NDArray[Any] = self._whole.numpy()
        return array

    def read_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        for head, target in enumerate(rows):
            target[...] = self._rows(slot, head, start, len(target)).numpy()

    def write_rows(self, slot: int, start: int, rows: NDArray[Any]) -> None:
        for head, source in enumerate(rows):
            self._rows(slot, head, start, len(source)).update_inplace(np.ascontiguousarray(source))

    def _rows(self, slot: int, head: int, start: int, count: int) -> onnxruntime.OrtValue:
        """Rows [rows, D] of one head, which are contiguous."""
        _, heads, length, width = self._shape
        return self._view(((slot * heads + head) * length + start) * width, (count, width))

    def _view(self, first: int, shape: tuple[int, ...]) -> onnxruntime.OrtValue:
        """A value of this shape over part of this buffer, from element ``first`` on."""
        address = self.value.data_ptr() + first * self._dtype.itemsize
        self._io.bind_output("num_accepted", self.value.device_name(), 0, self._dtype.type, shape, address)
        (view,) = self._io.get_outputs()
        self._io.clear_binding_outputs()
        return view


class _Buffers(NamedTuple):
    """Buffers of the bindings of one graph and block size, without the cache and what all forwards share."""

    input_ids: Buffer
    next_ids: Buffer
    logits: Buffer | None
    row_offsets: Buffer | None
    """Input of the lookahead graph, as is ``row_mask``: offsets of the block's rows, and which rows see which."""
    row_mask: Buffer | None


class _Key(NamedTuple):
    """Identifies a binding."""

    graph: str
    block_size: int
    head_size: int
    kv_length: int
    with_logits: bool


class _Binding(NamedTuple):
    """One ``IOBinding`` of a session and its buffers."""

    session: Any
    io: Any
    buffers: _Buffers
    run_options: Any
    """None without CUDA graphs."""


class OrtEngine(EngineBase):
    """Runs a bundle on ONNX Runtime. See ``Engine`` for the calls. Not thread-safe.

    The lookahead graph is loaded at its first use, because its session packs the weights a second time.

    Args:
        bundle: an opened bundle.
        device: ``cpu``, or ``cuda``, which needs onnxruntime-gpu and a GPU.
        num_slots: B; by default the bundle's batch size. A graph with fixed shapes allows no other number.
        threads: intra-op threads; by default as many as the process may use.
        cuda_graphs: ONNX Runtime records the forward of each n, KV length and set of outputs, in each thread that runs
            one, and replays it. It refuses a graph with a node that runs on the host.
        copies: keep values on the device and copy to and from them. Every device but ``cpu`` does so anyway; on ``cpu``
            it is for tests of that path.
        log_severity: ONNX Runtime's log level; 2 shows its warnings.

    Raises:
        OptionError: ``cuda_graphs`` is set for a device other than ``cuda``; or so many slots do not fit into memory.
        GpuError: there is no GPU, or ONNX Runtime has no CUDA provider.
        EngineError: ONNX Runtime does not take the graph.
        MissingExtraError: ONNX Runtime is not installed.
    """

    can_copy_rows = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "cpu",
        num_slots: int | None = None,
        threads: int | None = None,
        cuda_graphs: bool = False,
        copies: bool = False,
        log_severity: int = 3,
    ) -> None:
        manifest = bundle.manifest
        if cuda_graphs and device != "cuda":
            raise OptionError(f"cuda_graphs is for the device cuda, got {device!r}: leave it out")
        if device == "cuda":
            require_gpu()
        elif manifest.precision == "bf16":
            raise EngineError(
                f"{bundle.path} is a bf16 bundle, and ONNX Runtime's CPU provider multiplies no bf16 matrices: "
                "build it with precision='fp32', or run it on a GPU engine"
            )
        fixed = manifest.graphs[GREEDY_GRAPH].fixed_shapes
        is_small = device == "cpu" and bundle.weight_bytes <= CACHE_RESIDENT_BYTES
        super().__init__(
            manifest.geometry,
            num_slots=settle_slots(fixed, num_slots, manifest.batch_size),
            prefill_chunk=fixed.block_size if fixed else SMALL_CHUNK if is_small else CHUNK,
            fixed_shapes=fixed,
        )
        if device == "cpu":
            require_memory(self.num_slots, self.geometry.cache_bytes(manifest.precision))
        self._bundle = bundle
        self._device: Device = device
        self._threads = threads or available_threads()
        self._log_severity = log_severity
        self._linked = MappedWeights(bundle)  # must live as long as the sessions, which read through its maps
        self._graph_ids = itertools.count(1) if cuda_graphs else None
        self._sessions = {GREEDY_GRAPH: self._load(GREEDY_GRAPH)}
        self._provider_options = self._sessions[GREEDY_GRAPH].get_provider_options()[PROVIDERS[device]]
        self._views = self._sessions[GREEDY_GRAPH].io_binding() if copies or device != "cpu" else None
        """Makes the views of buffers on a device; None if buffers are host arrays."""
        self._cache = allocate(self.geometry, manifest.precision, self.num_slots, self._make_buffer)
        self._common = {name: self._make_buffer((self.num_slots,)) for name in (*COUNTS, "num_accepted")}
        self._common["positions"] = self._make_buffer((self.geometry.cache_length,))
        self._common["positions"].put(np.arange(self.geometry.cache_length))
        self._logits: NDArray[np.float32] | None = None
        self._buffers: dict[tuple[str, int, int, bool], _Buffers] = {}
        self._bindings: dict[tuple[str, int, int, int, bool], _Binding] = {}

    @property
    def cache_addresses(self) -> dict[str, int]:
        """Address of each cache tensor, by past name. Past and present share it."""
        return {past: buffer.value.data_ptr() for past, buffer in self._cache.items()}

    def describe(self) -> dict[str, Any]:
        if self._device == "cpu":
            device = describe_processor(self._threads)
        else:
            device = describe_gpu() | describe_cuda() | {"cuda_graphs": self._graph_ids is not None}
        options = {"session_options": dict(SESSION_OPTIONS), "provider_options": dict(self._provider_options)}
        return device | onnxruntime_version() | options

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        size = self._check_batch(batch)
        binding = self._binding(GREEDY_GRAPH, size, size, batch, with_logits=with_logits)
        self._run(binding, batch)
        return self._outcome(binding.buffers)

    def prefill(self, batch: Batch) -> None:
        size = self._check_batch(batch)
        binding = self._binding(GREEDY_GRAPH, size, size if self.fixed_shapes else 1, batch)
        self._run(binding, batch)

    def close(self) -> None:
        """Drop sessions, buffers and cache. The engine cannot run afterwards; closing it again does nothing."""
        self._is_closed = True
        for held in (self._bindings, self._buffers, self._common, self._cache, self._sessions):
            held.clear()
        self._views = self._logits = None
        trim_heap()

    def require_lookahead(self) -> None:
        self._require_open()
        if LOOKAHEAD_GRAPH in self._sessions:
            return
        if LOOKAHEAD_GRAPH not in self._bundle.manifest.graphs:
            raise OptionError(
                f"{self._bundle.path} has no lookahead graph: build it with: cllm-export build CHECKPOINT --output "
                f"{self._bundle.path} --lookahead --force (without --fixed-shapes; it says why where there can be none)"
            )
        self._sessions[LOOKAHEAD_GRAPH] = self._load(LOOKAHEAD_GRAPH)

    def forward_rows(self, batch: Batch, row_offsets: NDArray[np.int64], row_mask: NDArray[np.bool_]) -> Forward:
        self.require_lookahead()
        size = self._check_batch(batch)
        if row_offsets.shape != (size,) or row_mask.shape != (size, size):
            raise EngineError(
                f"a block of {size} needs that many row offsets and a mask of as many rows and columns, got "
                f"{list(row_offsets.shape)} and {list(row_mask.shape)}"
            )
        binding = self._binding(LOOKAHEAD_GRAPH, size, size, batch)
        offsets, mask = binding.buffers.row_offsets, binding.buffers.row_mask
        assert offsets, "which a binding of this graph has"
        assert mask, "and this too"
        offsets.put(row_offsets)
        mask.put(row_mask)
        self._run(binding, batch)
        return self._outcome(binding.buffers)

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        self._check_rows(slot, start, stop)
        geometry = self.geometry
        shape = (2 * geometry.num_layers, geometry.num_kv_heads, stop - start, geometry.head_dim)
        rows = np.empty(shape, self._cache_dtype)
        if stop > start:
            for buffer, tensor_rows in zip(self._cache.values(), rows, strict=True):
                buffer.read_rows(slot, start, tensor_rows)
        return rows

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        self._check_rows(slot, start, stop)
        check_row_shape(rows, stop - start, geometry=self.geometry, dtype=self._cache_dtype)
        if stop > start:
            for buffer, tensor_rows in zip(self._cache.values(), rows, strict=True):
                buffer.write_rows(slot, start, tensor_rows)

    def read_cache(self, past: str) -> NDArray[Any]:
        """A copy of a cache tensor [B, K, C, D]. The bits of bf16 come as uint16. For tests and diagnosis."""
        self._require_open()
        return self._cache[past].get().copy()

    def write_cache(self, past: str, values: ArrayLike) -> None:
        """Replace a cache tensor with values in the format of ``read_cache``, or fill it with a number."""
        self._require_open()
        self._cache[past].put(values)

    @property
    def _cache_dtype(self) -> np.dtype[Any]:
        """Dtype of the cache on the host."""
        return host_dtype(KV_DTYPE[self._bundle.manifest.precision])

    def _outcome(self, buffers: _Buffers) -> Forward:
        logits = None
        if buffers.logits is not None:
            logits = buffers.logits.get().reshape(self.num_slots, -1, self.geometry.vocab_size)
        return Forward(buffers.next_ids.get().tolist(), self._common["num_accepted"].get().tolist(), logits)

    def _run(self, binding: _Binding, batch: Batch) -> None:
        binding.buffers.input_ids.put(batch.input_ids)
        self._common["num_committed"].put(batch.num_committed)
        self._common["write_index"].put(batch.write_index)
        self._run_binding(binding)

    def _run_binding(self, binding: _Binding) -> None:
        started = perf_counter()
        try:
            binding.session.run_with_iobinding(binding.io, binding.run_options)
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            advice = ADVICE if binding.run_options else ""
            raise EngineError(f"ONNX Runtime failed in a forward on {self._device}: {error}{advice}") from error
        self.run_seconds += perf_counter() - started

    def _binding(self, graph: str, size: int, head_size: int, batch: Batch, *, with_logits: bool = False) -> _Binding:
        """The binding for a forward, made at its first use. Checks that the forward's rows lie inside the cache."""
        key = (graph, size, head_size, self._kv_length(size, batch.write_index), with_logits)
        binding = self._bindings.get(key)
        if binding is None:
            if self.fixed_shapes and size != self.fixed_shapes.block_size:
                raise EngineError(f"this graph is pinned to blocks of {self.fixed_shapes.block_size}, got {size}")
            binding = self._bindings[key] = self._bind(_Key(*key))
        return binding

    def _kv_length(self, size: int, write_index: Sequence[int]) -> int:
        """S of a forward. Its bounds are checked here, because on CUDA nothing else checks them."""
        if self.fixed_shapes:
            kv_length = self.fixed_shapes.kv_length
        else:
            bucket = graph_kv_length if self._graph_ids else kv_length_bucket
            kv_length = bucket(max(write_index) + size, self.geometry.cache_length)
        check_forward(block_size=size, write_index=write_index, kv_length=kv_length, geometry=self.geometry)
        return kv_length

    def _bind(self, key: _Key) -> _Binding:
        session = self._sessions[key.graph]
        buffers, io = self._buffers_of(key), session.io_binding()
        inputs = {
            "input_ids": buffers.input_ids,
            **{name: self._common[name] for name in COUNTS},
            "row_offsets": buffers.row_offsets,
            "row_mask": buffers.row_mask,
        }
        outputs = {"next_ids": buffers.next_ids, "num_accepted": self._common["num_accepted"], LOGITS: buffers.logits}
        for name, buffer in inputs.items():
            if buffer is not None:
                io.bind_ortvalue_input(name, buffer.value)
        positions = self._common["positions"].value
        for name, count in {"kv_positions": key.kv_length, "head_rows": key.head_size}.items():
            io.bind_input(name, positions.device_name(), 0, np.int64, (count,), positions.data_ptr())
        for name, buffer in outputs.items():
            if buffer is not None:
                io.bind_ortvalue_output(name, buffer.value)
        for past, present in cache_names(self.geometry.num_layers):
            io.bind_ortvalue_input(past, self._cache[past].value)
            io.bind_ortvalue_output(present, self._cache[past].value)
        return _Binding(session, io, buffers, self._run_options(is_recorded=key.head_size == key.block_size))

    def _buffers_of(self, key: _Key) -> _Buffers:
        """Buffers of a binding. Bindings that differ only in KV length share them."""
        shared = (key.graph, key.block_size, key.head_size, key.with_logits)
        if shared not in self._buffers:
            slots, size, head_size = self.num_slots, key.block_size, key.head_size
            has_rows = key.graph == LOOKAHEAD_GRAPH
            logits_shape = (slots * head_size, self.geometry.vocab_size)
            self._buffers[shared] = _Buffers(
                input_ids=self._make_buffer((slots, size)),
                next_ids=self._make_buffer((slots, head_size)),
                logits=self._make_logits(logits_shape) if key.with_logits else None,
                row_offsets=self._make_buffer((size,)) if has_rows else None,
                row_mask=self._make_buffer((size, size), "bool") if has_rows else None,
            )
        return self._buffers[shared]

    def _make_buffer(self, shape: tuple[int, ...], dtype: DType = "int64") -> Buffer:
        if self._views is None:
            return HostBuffer(np.zeros(shape, dtype))
        return DeviceBuffer(shape, dtype, device=self._device, io=self._views)

    def _make_logits(self, shape: tuple[int, int]) -> Buffer:
        """A buffer for logits [rows, V]. On the host, all sizes share their memory: a forward's logits are valid until
        the next one. Pages of it that no forward has written take no memory."""
        if self._views is not None:
            return self._make_buffer(shape, "float32")
        if self._logits is None or len(self._logits) < shape[0]:
            most = max(shape[0], self.num_slots * self.geometry.max_block_size)
            self._logits = np.empty((most, shape[1]), np.float32)
        return HostBuffer(self._logits[: shape[0]])

    def _run_options(self, *, is_recorded: bool) -> Any:
        """Options of a binding's runs: its own graph id, or no graph for a prefill chunk, whose head has one row."""
        if self._graph_ids is None:
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(next(self._graph_ids)) if is_recorded else NO_GRAPH)
        return options

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        path = self._bundle.graph_path(graph)
        options = _session_options(self._threads, self._log_severity, self._device)
        self._linked.hand_to(options)
        with self._linked.releasing_pages():
            session = self._open_session(path, options)
        drop_file_pages(self._bundle.path / WEIGHTS_NAME)
        trim_heap()
        return session

    def _open_session(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        """A session of the graph in this file."""
        return make_session(str(path), options, name=path, device=self._device, cuda_graphs=self._graph_ids is not None)


def settle_slots(fixed: FixedShapes | None, num_slots: int | None, batch_size: int) -> int:
    """B of an engine: the given number, else the bundle's batch size. A graph with fixed shapes has its own B.

    Raises:
        OptionError: ``num_slots`` is no valid number of slots.
        EngineError: the graph is pinned to another number.
    """
    if num_slots is not None:
        require_at_least("num_slots", num_slots, 1)
    if fixed and num_slots not in (None, fixed.batch_size):
        raise EngineError(f"this graph is pinned to {fixed.batch_size} slots, got num_slots={num_slots}")
    return fixed.batch_size if fixed else num_slots or batch_size


def element_type(dtype: DType) -> Any:
    """A dtype as ONNX Runtime's Python API takes it."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def host_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype for a dtype on the host. numpy has no bf16, so uint16 holds its bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _session_options(threads: int, log_severity: int, device: Device) -> onnxruntime.SessionOptions:
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", extra=device) from None
    require_floors("onnxruntime", "onnxruntime-gpu", "tokenizers")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = log_severity
    level = SESSION_OPTIONS["graph_optimization_level"]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry(*QDQ_AS_WRITTEN)
    return options


def make_session(
    graph: str | bytes,
    options: onnxruntime.SessionOptions,
    *,
    name: Path,
    device: Device = "cpu",
    cuda_graphs: bool = False,
) -> onnxruntime.InferenceSession:
    """A session of a graph, from its file or from memory. Errors call the graph ``name``.

    Raises:
        GpuError: ONNX Runtime has no CUDA provider, or does not start it.
        EngineError: ONNX Runtime does not load the graph.
    """
    import onnxruntime

    provider = PROVIDERS[device]
    if device == "cuda" and provider not in onnxruntime.get_available_providers():
        raise GpuError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider}: it is the package for the CPU; "
            f"replace it with: pip uninstall -y onnxruntime; {install_line('cuda')}"
        )
    try:
        asked = (provider, dict([ENABLE_GRAPHS])) if cuda_graphs else provider
        session = onnxruntime.InferenceSession(graph, options, providers=[asked])
    except Exception as error:  # onnxruntime raises its own types, unrelated to each other
        advice = ADVICE if cuda_graphs else ""
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} does not load {name} on {device}: {error}{advice}"
        ) from error
    if (
        device == "cuda" and provider not in session.get_providers()
    ):  # ONNX Runtime falls back to the CPU, and only its log says so
        raise GpuError(f"ONNX Runtime did not start its {provider}; see what is missing with: cllm-export doctor")
    return session


def bindable(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """An OrtValue over the array's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
