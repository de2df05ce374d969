"""The ONNX Runtime engine: a session for each graph in use, static buffers bound once for each shape, one KV cache that
all of them update in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.contract import LOGITS, FixedShapes, Geometry, cache_names, check_forward, check_rows
from cllm_export.bundle.manifest import GREEDY_GRAPH, LOOKAHEAD_GRAPH, Bundle
from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, MissingExtraError, OptionError
from cllm_export.runtime.engines.base import Forward, KvRows
from cllm_export.runtime.engines.kv_cache import allocate, check_row_shape, kv_extent
from cllm_export.runtime.engines.machine import available_threads
from cllm_export.runtime.engines.mapped_weights import MappedWeights

if TYPE_CHECKING:
    import onnxruntime


Int64Array = NDArray[np.int64]

CACHE_RESIDENT_BYTES = 32 << 20
"""Weights up to this size live in a processor's last-level cache while decoding, unless something turns them out."""

SMALL_CHUNK, CHUNK = 16, 128
"""Tokens a prefill forward takes. A wide forward reads the weights less often, which pays where they come from memory;
where they live in cache it pays nothing, and turns them out for the next ten decode forwards or so: on the demo model
128 instead of 16 costs an autoregressive request 20 % of its decode and wins the same time in prefill."""

QDQ_AS_WRITTEN = ("session.disable_quant_qdq", "1")
"""Session setting: multiply what was dequantised, in fp32. The fused kernels of signed bytes that would take its place
add products in 16 bits on x86 without VNNI and saturate without a word: half of a tiny model's logits moved by a
tenth of their spread."""


class _Buffers(NamedTuple):
    """Input and output arrays of one block size, written and read in place."""

    input_ids: Int64Array
    head_rows: Int64Array
    next_ids: Int64Array
    logits: NDArray[np.float32] | None


class _RowBuffers(NamedTuple):
    """What the rows of a block are to each other: inputs of the lookahead graph."""

    offsets: Int64Array
    mask: NDArray[np.bool_]


class _Binding(NamedTuple):
    """One ``IOBinding`` for a block size and extent, and the buffers behind it."""

    buffers: _Buffers
    io: Any
    rows: _RowBuffers | None = None


class OrtEngine:
    """Runs a bundle on ONNX Runtime's CPU provider. See ``LookaheadEngine`` for the calls. Not thread-safe.

    The lookahead graph is loaded when it is first asked for: its session packs the weights a second time.

    Args:
        bundle: an opened bundle.
        num_slots: B; by default the bundle's batch size. A graph with fixed shapes has its own.
        threads: intra-op threads; by default as many as the process may use.
        log_severity: ONNX Runtime's own level, 2 to see its warnings.

    Raises:
        EngineError: ONNX Runtime does not take the graph.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        num_slots: int | None = None,
        threads: int | None = None,
        log_severity: int = 3,
    ) -> None:
        manifest = bundle.manifest
        if manifest.precision == "bf16":
            raise EngineError(
                f"{bundle.path} is a bf16 bundle, and ONNX Runtime's CPU provider multiplies no bf16 matrices: "
                "build it with precision='fp32', or run it on a GPU engine"
            )
        self._bundle = bundle
        self._threads = threads or available_threads()
        self._log_severity = log_severity
        self._fixed = manifest.graphs[GREEDY_GRAPH].fixed_shapes
        self._geometry = manifest.geometry
        self._num_slots = settle_slots(self._fixed, num_slots, manifest.batch_size)
        self._linked = MappedWeights(bundle)  # sessions read them through this map
        self._is_closed = False
        self._session: onnxruntime.InferenceSession | None = self._load(GREEDY_GRAPH)
        self._lookahead: onnxruntime.InferenceSession | None = None
        self._chunk = SMALL_CHUNK if bundle.weight_bytes <= CACHE_RESIDENT_BYTES else CHUNK
        self.run_seconds = 0.0
        self.cache = allocate(self._geometry, manifest.precision, self._num_slots)
        """The KV buffers [B, K, C, D] by past name: the very memory the graph reads and writes."""
        self._cache_values = {name: bindable(array) for name, array in self.cache.items()}
        self._num_committed = np.zeros(self._num_slots, np.int64)
        self._write_index = np.zeros(self._num_slots, np.int64)
        self._num_accepted = np.zeros(self._num_slots, np.int64)
        self._positions = np.arange(self._geometry.cache_length, dtype=np.int64)
        self._buffers: dict[tuple[int, int, bool], _Buffers] = {}
        self._bindings: dict[tuple[int, int, int, bool], _Binding] = {}
        self._row_buffers: dict[int, _RowBuffers] = {}
        self._row_bindings: dict[tuple[int, int], _Binding] = {}

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def prefill_chunk(self) -> int:
        return self._fixed.block_size if self._fixed else self._chunk

    @property
    def fixed_shapes(self) -> FixedShapes | None:
        return self._fixed

    def forward(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        *,
        with_logits: bool = False,
    ) -> Forward:
        block_size = len(input_ids[0])
        buffers = self._run(input_ids, num_committed, write_index, block_size, block_size, with_logits=with_logits)
        return Forward(buffers.next_ids.tolist(), self._num_accepted.tolist(), buffers.logits)

    def prefill(
        self, input_ids: Sequence[Sequence[int]], num_committed: Sequence[int], write_index: Sequence[int]
    ) -> None:
        chunk_size = len(input_ids[0])
        self._run(input_ids, num_committed, write_index, chunk_size, chunk_size if self._fixed else 1)

    def close(self) -> None:
        """Drop sessions, buffers and cache. The engine cannot run afterwards; closing it again does nothing."""
        self._is_closed = True
        for bound in (self._bindings, self._row_bindings, self._buffers, self._row_buffers):
            bound.clear()
        self._cache_values.clear()
        self.cache.clear()
        self._session = self._lookahead = None

    def require_lookahead(self) -> None:
        self._require_open()
        if self._lookahead is not None:
            return
        if LOOKAHEAD_GRAPH not in self._bundle.manifest.graphs:
            raise OptionError(
                f"{self._bundle.path} has no lookahead graph: build it with: cllm-export build CHECKPOINT --output "
                f"{self._bundle.path} --lookahead --force (without --fixed-shapes; it says why where there can be none)"
            )
        self._lookahead = self._load(LOOKAHEAD_GRAPH)

    def forward_rows(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        row_offsets: Int64Array,
        row_mask: NDArray[np.bool_],
    ) -> Forward:
        self.require_lookahead()
        block_size = len(input_ids[0])
        self._check_slots(input_ids, num_committed, write_index)
        binding = self._row_binding(block_size, max(write_index))
        assert binding.rows is not None
        if row_offsets.shape != (block_size,) or row_mask.shape != (block_size, block_size):
            raise EngineError(
                f"a block of {block_size} needs that many row offsets and a mask of as many rows and columns, got "
                f"{list(row_offsets.shape)} and {list(row_mask.shape)}"
            )
        binding.rows.offsets[:] = row_offsets
        binding.rows.mask[:] = row_mask
        self._fill(binding, input_ids, num_committed, write_index)
        self._run_binding(binding, self._lookahead)
        return Forward(binding.buffers.next_ids.tolist(), self._num_accepted.tolist())

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        self._require_open()
        check_rows(slot=slot, start=start, stop=stop, num_slots=self._num_slots, geometry=self._geometry)
        return np.stack([array[slot, :, start:stop] for array in self.cache.values()])

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        self._require_open()
        check_rows(slot=slot, start=start, stop=stop, num_slots=self._num_slots, geometry=self._geometry)
        check_row_shape(rows, stop - start, geometry=self._geometry, dtype=next(iter(self.cache.values())).dtype)
        for array, tensor_rows in zip(self.cache.values(), rows, strict=True):
            array[slot, :, start:stop] = tensor_rows

    def run_bound(self, block_size: int, write_index: int) -> None:
        """One forward over whatever the buffers hold, every slot at the same write index: the bare engine, for
        timing."""
        self._write_index.fill(write_index)
        self._num_committed.fill(1)
        self._run_binding(self._binding(block_size, block_size, write_index), self._session)

    def _run(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        block_size: int,
        head_size: int,
        *,
        with_logits: bool = False,
    ) -> _Buffers:
        self._check_slots(input_ids, num_committed, write_index)
        binding = self._binding(block_size, head_size, max(write_index), with_logits=with_logits)
        self._fill(binding, input_ids, num_committed, write_index)
        self._run_binding(binding, self._session)
        return binding.buffers

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("this engine is closed; load the bundle again")

    def _check_slots(self, *given: Sequence[Any]) -> None:
        if any(len(each) != self._num_slots for each in given):
            raise EngineError(
                f"a forward needs a block, num_committed and write_index for each of {self._num_slots} slots"
            )

    def _fill(
        self,
        binding: _Binding,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
    ) -> None:
        try:
            binding.buffers.input_ids[:] = input_ids
        except ValueError as error:
            size = binding.buffers.input_ids.shape[1]
            raise EngineError(f"the blocks of one forward must all have {size} tokens: {error}") from None
        self._num_committed[:] = num_committed
        self._write_index[:] = write_index

    def _run_binding(self, binding: _Binding, session: Any) -> None:
        started = perf_counter()
        try:
            session.run_with_iobinding(binding.io)
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            raise EngineError(f"ONNX Runtime failed in a forward: {error}") from error
        self.run_seconds += perf_counter() - started

    def _binding(self, block_size: int, head_size: int, write_index: int, *, with_logits: bool = False) -> _Binding:
        extent = self._extent(block_size, write_index)
        key = (block_size, head_size, extent, with_logits)
        binding = self._bindings.get(key)
        if binding is None:
            self._check_shape(block_size)
            binding = self._bindings[key] = self._bind(*key)
        return binding

    def _row_binding(self, block_size: int, write_index: int) -> _Binding:
        extent = self._extent(block_size, write_index)
        key = (block_size, extent)
        if key not in self._row_bindings:
            new = _RowBuffers(np.zeros(block_size, np.int64), np.zeros((block_size, block_size), np.bool_))
            rows = self._row_buffers.setdefault(block_size, new)
            buffers = self._make_buffers(block_size, block_size, False)
            io = self._bind_io(self._lookahead, buffers, extent)
            io.bind_ortvalue_input("row_offsets", bindable(rows.offsets))
            io.bind_ortvalue_input("row_mask", bindable(rows.mask))
            self._row_bindings[key] = _Binding(buffers, io, rows)
        return self._row_bindings[key]

    def _extent(self, block_size: int, write_index: int) -> int:
        """S of a forward, which fits the cache."""
        self._require_open()
        cache_length = self._geometry.cache_length
        extent = self._fixed.kv_extent if self._fixed else kv_extent(write_index + block_size, cache_length)
        check_forward(block_size=block_size, write_index=write_index, kv_extent=extent, geometry=self._geometry)
        return extent

    def _check_shape(self, block_size: int) -> None:
        if self._fixed and block_size != self._fixed.block_size:
            raise EngineError(f"this graph is pinned to blocks of {self._fixed.block_size}, got {block_size}")

    def _bind(self, block_size: int, head_size: int, extent: int, with_logits: bool) -> _Binding:
        buffers = self._make_buffers(block_size, head_size, with_logits)
        return _Binding(buffers, self._bind_io(self._session, buffers, extent))

    def _bind_io(self, session: Any, buffers: _Buffers, extent: int) -> Any:
        """What every graph has, bound to the buffers and to the one cache."""
        io = session.io_binding()
        inputs = {
            "input_ids": buffers.input_ids,
            "num_committed": self._num_committed,
            "write_index": self._write_index,
            "kv_positions": self._positions[:extent],
            "head_rows": buffers.head_rows,
        }
        for name, array in inputs.items():
            io.bind_ortvalue_input(name, bindable(array))
        io.bind_ortvalue_output("next_ids", bindable(buffers.next_ids))
        io.bind_ortvalue_output("num_accepted", bindable(self._num_accepted))
        if buffers.logits is not None:
            rows = buffers.logits.reshape(-1, self._geometry.vocab_size)  # a view: the same memory
            io.bind_ortvalue_output(LOGITS, bindable(rows))
        for past, present in cache_names(self._geometry.num_layers):
            io.bind_ortvalue_input(past, self._cache_values[past])
            io.bind_ortvalue_output(present, self._cache_values[past])
        return io

    def _make_buffers(self, block_size: int, head_size: int, with_logits: bool) -> _Buffers:
        key = (block_size, head_size, with_logits)
        logits_shape = (self._num_slots, head_size, self._geometry.vocab_size)
        if key not in self._buffers:
            self._buffers[key] = _Buffers(
                input_ids=np.zeros((self._num_slots, block_size), np.int64),
                head_rows=np.arange(head_size, dtype=np.int64),
                next_ids=np.zeros((self._num_slots, head_size), np.int64),
                logits=np.zeros(logits_shape, np.float32) if with_logits else None,
            )
        return self._buffers[key]

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        path = self._bundle.graph_path(graph)
        options = _session_options(self._threads, self._log_severity)
        self._linked.hand_to(options)
        session = self._open_session(path, options)
        self._linked.release_pages()
        return session

    def _open_session(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        """A session of the graph in a file."""
        return make_session(str(path), options, name=path)


def settle_slots(fixed: FixedShapes | None, num_slots: int | None, batch_size: int) -> int:
    """B of an engine: what was asked for, else the bundle's; a pinned graph has its own.

    Raises:
        OptionError: not a number of slots.
        EngineError: the graph is pinned to another number.
    """
    if num_slots is not None:
        require_at_least("num_slots", num_slots, 1)
    if fixed and num_slots not in (None, fixed.batch_size):
        raise EngineError(f"this graph is pinned to {fixed.batch_size} slots, got num_slots={num_slots}")
    return fixed.batch_size if fixed else num_slots or batch_size


def _session_options(threads: int, log_severity: int) -> onnxruntime.SessionOptions:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", extra="cpu") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = log_severity
    options.add_session_config_entry(*QDQ_AS_WRITTEN)
    return options


def make_session(
    graph: str | bytes, options: onnxruntime.SessionOptions, *, name: Path
) -> onnxruntime.InferenceSession:
    """A session of a graph, from its file or from memory; ``name`` is what errors call it.

    Raises:
        EngineError: ONNX Runtime does not take it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, unrelated to each other
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} does not load {name}: {error}") from error


def bindable(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """An OrtValue over the array's own memory."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
