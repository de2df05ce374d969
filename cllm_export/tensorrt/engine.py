"""The TensorRT engine: a plan, static device buffers, a KV cache updated in place, and one CUDA graph for each shape.

It needs ``tensorrt`` and cuda-python, and no torch. Weights, cache and positions stay on the device, and so do logits
unless a slot samples. In each forward the block and two numbers per slot are copied in. Its predictions and one number
per slot are copied out. Contexts share one scratch buffer, since one stream runs one forward at a time.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from cllm_export.bundle.contract import (
    BYTES,
    LOGITS,
    Batch,
    TensorSpec,
    cache_names,
    check_forward,
    graph_inputs,
    graph_outputs,
)
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.errors import EngineError, PlanError
from cllm_export.runtime.engines.base import EngineBase, Forward, KvRows
from cllm_export.runtime.engines.cuda import Cuda, Direction
from cllm_export.runtime.engines.kv_cache import check_row_shape
from cllm_export.tensorrt.card_kernels import CardKernels
from cllm_export.tensorrt.device_buffers import DeviceMemory
from cllm_export.tensorrt.graph import GraphSource, errors_of
from cllm_export.tensorrt.library import Gpu, Log, open_gpu
from cllm_export.tensorrt.plan_files import Plan, Platform, find_plan, require_fit
from cllm_export.tensorrt.smoke import run_smoke

INT64 = 8
PREFILL = 0
"""Index of the prefill profile. The profiles of the block sizes follow."""
DTYPE_NAMES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class _Shape(NamedTuple):
    """The shape of a forward, which determines its kernels."""

    profile: int
    block_size: int
    head_size: int
    kv_length: int


def platform_of(gpu: Gpu) -> Platform:
    """The platform of this machine. A plan that is built or run here is tied to it."""
    facts = gpu.facts
    return Platform(
        gpu=facts.name,
        compute_capability=facts.compute_capability,
        tensorrt=gpu.version,
        driver=facts.driver,
        engine=gpu.library.name,
    )


class TrtEngine(EngineBase):
    """Runs a bundle's plan. See ``Engine`` for the calls. Not thread-safe. Close it, or use it in a ``with``.

    Args:
        bundle: an opened bundle.
        plan: one of the bundle's plans; by default the newest that fits this machine.
        gpu: the GPU; by default the first.
        cuda_graphs: replay captured forwards. If False, every forward is enqueued kernel by kernel, for comparison.

    Raises:
        GpuError: there is no GPU, or TensorRT is too old or does not load.
        MissingExtraError: TensorRT or cuda-python is not installed.
        PlanError: the bundle has no plan for this machine, or a plan fails in its first forwards on this card.
        EngineError: TensorRT does not load the plan, or the plan breaks the contract.
    """

    can_copy_rows = True
    has_device_loop = True

    def __init__(
        self, bundle: Bundle, *, plan: Plan | None = None, gpu: Gpu | None = None, cuda_graphs: bool = True
    ) -> None:
        gpu = gpu or open_gpu()
        plan = plan or find_plan(bundle, platform_of(gpu))
        require_fit(plan, bundle, platform_of(gpu))
        self._settings, self._plan = plan.manifest.settings, plan
        super().__init__(
            bundle.manifest.geometry,
            num_slots=self._settings.batch_size,
            prefill_chunk=self._settings.prefill_chunk,
            fixed_shapes=bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes,
        )
        self.block_sizes = self._settings.block_sizes
        self._gpu, self._trt, self._cuda = gpu, gpu.tensorrt, gpu.cuda
        self._inputs = graph_inputs(self.geometry, bundle.manifest.precision, self.fixed_shapes)
        self._outputs = graph_outputs(self.geometry, bundle.manifest.precision, self.fixed_shapes)
        self._cuda_graphs = cuda_graphs
        self._log = Log(self._trt)
        self._kernels: CardKernels | None = None
        self.num_syncs = 0
        """How often the host has waited for the device: once per forward."""
        self._graphs: dict[_Shape, Any] = {}
        self._contexts: dict[int, Any] = {}
        self._bound: dict[int, _Shape] = {}
        """The shape that each profile's context is set to, by profile."""
        with contextlib.ExitStack() as owned:
            self._stream = self._cuda.make_stream()
            owned.callback(self._cuda.destroy_stream, self._stream)
            self._engine = self._load(bundle, plan)
            owned.callback(self._drop_engine)
            self._check_engine()
            self._allocate(DeviceMemory(self._cuda, owned))
            owned.callback(self._drop_contexts)
            if gpu.library.compiles_on_card:
                self._kernels = CardKernels(self._trt, self._engine, plan, platform_of(gpu))
                if not self._kernels.were_kept:
                    self._run_first(plan)
                    self._kernels.keep()
            self._owned = owned.pop_all()

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything on the device. The engine cannot run afterwards; closing it again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._owned.close()

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """Each KV length S that forwards run with, ascending."""
        return self._settings.kv_lengths

    @property
    def max_block_size(self) -> int:
        return self.block_sizes[-1]

    @property
    def has_logits(self) -> bool:  # type: ignore[override]
        return self._settings.logits

    def describe(self) -> dict[str, Any]:
        facts = self._gpu.facts
        return {
            "device": facts.name,
            "compute_capability": facts.compute_capability,
            "driver": facts.driver,
            self._gpu.library.name: self._gpu.version,
            "plan": self._plan.path.name,
            "plan_sha256": self._plan.manifest.sha256,
        }

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        if with_logits and not self._settings.logits:
            raise EngineError("this plan was built with logits=False, and this request needs them: build it without")
        size, slots = self._check_batch(batch), self.num_slots
        padded = self._padded_size(size)
        profile = PREFILL if self.fixed_shapes else 1 + self.block_sizes.index(padded)
        kv_length = self._kv_length(padded, batch.write_index)
        shape = _Shape(profile=profile, block_size=padded, head_size=padded, kv_length=kv_length)
        self._run(shape, batch, with_logits=with_logits)
        next_ids = self._host["next_ids"].array[: slots * padded].reshape(slots, padded)[:, :size]
        num_accepted = np.minimum(self._host["num_accepted"].array, size)
        logits = None
        if with_logits:
            vocab_size = self.geometry.vocab_size
            logits = (
                self._host[LOGITS].array[: slots * padded * vocab_size].reshape(slots, padded, vocab_size)[:, :size]
            )
        return Forward(next_ids.tolist(), num_accepted.tolist(), logits)

    def _padded_size(self, size: int) -> int:
        """n of the profile that runs a block: the block's own n, or the next larger one.

        A larger block is padded with tokens that have no effect. Their rows lie above the block's rows and are dead.
        The cache has room for the largest block.
        """
        found = next((each for each in self.block_sizes if each >= size), None)
        if found is None or (self.fixed_shapes and found != size):
            raise EngineError(
                f"this plan has profiles for blocks of {', '.join(map(str, self.block_sizes))}, got {size}; build one "
                f"with: cllm-export plan BUNDLE --block-size {size}"
            )
        return found

    def prefill(self, batch: Batch) -> None:
        size = self._check_batch(batch)
        if size > self.prefill_chunk or (self.fixed_shapes and size != self.prefill_chunk):
            raise EngineError(f"this plan takes chunks of {self.prefill_chunk} tokens, got {size}")
        kv_length = self._kv_length(size, batch.write_index)
        head_size = size if self.fixed_shapes else 1
        shape = _Shape(profile=PREFILL, block_size=size, head_size=head_size, kv_length=kv_length)
        self._run(shape, batch)

    @property
    def gpu(self) -> Gpu:
        """The GPU that the engine runs on."""
        return self._gpu

    @property
    def cuda(self) -> Cuda:
        return self._cuda

    @property
    def stream(self) -> Any:
        """The stream that every forward is enqueued on."""
        return self._stream

    @property
    def addresses(self) -> dict[str, int]:
        """Device address of every input and output, by name."""
        return dict(self._addresses)

    def kv_length_for(self, needed: int) -> int:
        """The smallest KV length S of the plan that holds ``needed`` rows.

        Raises:
            EngineError: the plan's largest KV length holds fewer.
        """
        found = next((each for each in self._settings.kv_lengths if each >= needed), None)
        if found is None:
            raise EngineError(
                f"{needed} cache rows are needed, this plan reads {self._settings.kv_lengths[-1]} at most"
            )
        return found

    def enqueue_decode(self, block_size: int, kv_length: int) -> None:
        """Enqueue a decode forward over the device buffers, without a copy or a wait, for a loop on the device.

        The caller must ensure that every slot's rows lie inside the KV length.
        """
        self._require_open()
        profile = PREFILL if self.fixed_shapes else 1 + self.block_sizes.index(block_size)
        self._execute(_Shape(profile=profile, block_size=block_size, head_size=block_size, kv_length=kv_length))

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        self._check_rows(slot, start, stop)
        rows = np.zeros(self._rows_shape(stop - start), self._cache_dtype)
        self._copy_rows(rows, slot, start, "to host")
        return rows

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        self._check_rows(slot, start, stop)
        check_row_shape(rows, stop - start, geometry=self.geometry, dtype=self._cache_dtype)
        self._copy_rows(np.ascontiguousarray(rows), slot, start, "to device")

    def _copy_rows(self, rows: KvRows, slot: int, start: int, direction: Direction) -> None:
        """Copy rows [2L, K, rows, D] from or to a slot. The rows of a head are contiguous on both sides."""
        self._require_open()
        geometry, row_bytes = self.geometry, self.geometry.head_dim * rows.itemsize
        size = rows.shape[2] * row_bytes
        if not size:
            return
        host = rows.ctypes.data
        for past, _ in cache_names(geometry.num_layers):
            for head in range(geometry.num_kv_heads):
                row = (slot * geometry.num_kv_heads + head) * geometry.cache_length + start
                device = self._addresses[past] + row * row_bytes
                target, source = (host, device) if direction == "to host" else (device, host)
                self._cuda.copy(target, source, size, direction, self._stream)
                host += size
        self._cuda.synchronize(self._stream)

    def _rows_shape(self, count: int) -> tuple[int, ...]:
        geometry = self.geometry
        return (2 * geometry.num_layers, geometry.num_kv_heads, count, geometry.head_dim)

    @property
    def _cache_dtype(self) -> np.dtype[Any]:
        """Dtype of the cache on the host. numpy has no bf16, so uint16 holds its bits."""
        spec = next(spec for spec in self._inputs if spec.name.startswith("past"))
        return np.dtype("uint16" if spec.dtype == "bfloat16" else spec.dtype)

    # Loading.

    def _load(self, bundle: Bundle, plan: Plan) -> Any:
        self._runtime = self._trt.Runtime(self._log.logger)
        if self._settings.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan contains the runtime that it needs
        with (
            plan.file.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            engine = self._runtime.deserialize_cuda_engine(view)
        if engine is None:
            raise EngineError(self._log.explain(f"TensorRT does not load {plan.file}"))
        if self._settings.strip_weights:
            self._refit(engine, bundle)
        if self._settings.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _refit(self, engine: Any, bundle: Bundle) -> None:
        """Put the bundle's weights into a plan that was built without weights."""
        refitter = self._trt.Refitter(engine, self._log.logger)
        reader = self._trt.OnnxParserRefitter(refitter, self._log.logger)
        source = GraphSource(bundle)
        if not source.refit(reader) or not refitter.refit_cuda_engine():
            reason = errors_of(reader) or "it misses " + ", ".join(refitter.get_missing_weights()[:3])
            raise EngineError(self._log.explain(f"the weights of {source.path} do not fit the plan: {reason}"))
        del reader, refitter  # they must go before the maps that they read from

    def _check_engine(self) -> None:
        """Check that the plan has the contract's tensors, all on the device, and updates the cache in place."""
        engine = self._engine
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        specs = [spec for spec in (*self._inputs, *self._outputs) if spec.name != LOGITS or self._settings.logits]
        if found != {spec.name for spec in specs}:
            differing = ", ".join(sorted(found ^ {spec.name for spec in specs}))
            raise EngineError(f"the plan's tensors are not the contract's: {differing}")
        for spec in specs:
            self._check_tensor(spec)
        for past, present in cache_names(self.geometry.num_layers):
            if (alias := engine.get_aliased_input_tensor(present)) != past:
                raise EngineError(f"the plan does not write {present} in place of {past} (it is {alias or 'apart'})")

    def _check_tensor(self, spec: TensorSpec) -> None:
        name, wanted = spec.name, getattr(self._trt.DataType, DTYPE_NAMES[spec.dtype])
        if (dtype := self._engine.get_tensor_dtype(name)) != wanted:
            raise EngineError(f"the plan has {name} in {dtype}, the contract says {wanted}")
        if self._engine.is_shape_inference_io(name):
            raise EngineError(f"the plan wants {name} in host memory, so that it cannot stay on the device")

    # Memory.

    def _allocate(self, memory: DeviceMemory) -> None:
        slots, geometry, settings = self.num_slots, self.geometry, self._settings
        widest = max(settings.prefill_chunk, *settings.block_sizes)
        positions = max(geometry.cache_length, widest)
        logits = slots * settings.block_sizes[-1] * geometry.vocab_size if settings.logits else 0
        counts = {
            "input_ids": slots * widest,
            "num_committed": slots,
            "write_index": slots,
            "next_ids": slots * widest,
            "num_accepted": slots,
        }
        self._host = {name: memory.host(count, np.dtype(np.int64)) for name, count in counts.items()}
        self._addresses = {name: memory.device(count * INT64) for name, count in counts.items()}
        if logits:
            self._host[LOGITS] = memory.host(logits, np.dtype(np.float32))
            self._addresses[LOGITS] = memory.device(logits * BYTES["float32"])
        self._addresses["kv_positions"] = self._addresses["head_rows"] = memory.device(positions * INT64)
        self._allocate_cache(memory)
        profiles = range(self._engine.num_optimization_profiles)
        self._scratch_size = max(self._engine.get_device_memory_size_for_profile_v2(index) for index in profiles)
        self._scratch = memory.device(max(1, self._scratch_size))
        counting = np.arange(positions, dtype=np.int64)
        address = self._addresses["kv_positions"]
        self._cuda.copy(address, counting.ctypes.data, counting.nbytes, "to device", self._stream)
        self._cuda.synchronize(self._stream)

    def _allocate_cache(self, memory: DeviceMemory) -> None:
        """Allocate the cache and zero it once. A NaN in a dead row would leak, since 0 * NaN is NaN."""
        specs = {spec.name: spec for spec in self._inputs}
        for past, present in cache_names(self.geometry.num_layers):
            size = int(np.prod(self._cache_shape())) * BYTES[specs[past].dtype]
            self._addresses[past] = self._addresses[present] = memory.device(size)
        self._clear_cache()

    def _clear_cache(self) -> None:
        specs = {spec.name: spec for spec in self._inputs}
        for past, _ in cache_names(self.geometry.num_layers):
            size = int(np.prod(self._cache_shape())) * BYTES[specs[past].dtype]
            self._cuda.clear(self._addresses[past], size, self._stream)

    def _cache_shape(self) -> tuple[int, ...]:
        geometry = self.geometry
        return (self.num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)

    def _run_first(self, plan: Plan) -> None:
        """Run each shape of a plan that no forward has run on this card yet, and leave the engine as it was.

        Raises:
            PlanError: a forward fails.
        """
        try:
            run_smoke(self, every_kv_length=True)
        except EngineError as error:
            raise PlanError(f"{plan.path} does not run on this card: {error}") from error
        self._clear_cache()
        self._cuda.synchronize(self._stream)
        self.num_syncs, self.run_seconds = 0, 0.0

    def _drop_engine(self) -> None:
        self._kernels = None
        del self._engine, self._runtime

    def _drop_contexts(self) -> None:
        self._cuda.synchronize(self._stream)
        for graph in self._graphs.values():
            self._cuda.destroy_graph(graph)
        self._graphs.clear()
        self._contexts.clear()

    # Running.

    def _kv_length(self, block_size: int, write_index: Sequence[int]) -> int:
        """The KV length S of a forward. Checks its bounds: TensorRT silently ignores a write outside the cache."""
        needed = max(write_index) + block_size
        kv_length = next((each for each in self._settings.kv_lengths if each >= needed), self._settings.kv_lengths[-1])
        check_forward(block_size=block_size, write_index=write_index, kv_length=kv_length, geometry=self.geometry)
        return kv_length

    def _run(self, shape: _Shape, batch: Batch, *, with_logits: bool = False) -> None:
        self._write_inputs(shape, batch)
        started = perf_counter()
        graph = self._graphs.get(shape)
        if graph is None:
            self._enqueue(shape)
            self._capture(shape)
        else:
            self._cuda.launch(graph, self._stream)
        if with_logits:
            size = self.num_slots * shape.head_size * self.geometry.vocab_size * BYTES["float32"]
            self._cuda.copy(self._host[LOGITS].address, self._addresses[LOGITS], size, "to host", self._stream)
        self._cuda.synchronize(self._stream)
        self.num_syncs += 1
        self.run_seconds += perf_counter() - started

    def _write_inputs(self, shape: _Shape, batch: Batch) -> None:
        slots, size, vocabulary = self.num_slots, shape.block_size, self.geometry.vocab_size
        blocks = np.zeros((slots, size), np.int64)
        blocks[:, : len(batch.input_ids[0])] = batch.input_ids
        if blocks.min() < 0 or blocks.max() >= vocabulary:  # it would read outside the embedding table
            raise EngineError(f"tokens must be 0 to {vocabulary - 1}, got {blocks.min()} to {blocks.max()}")
        self._host["input_ids"].array[: slots * size] = blocks.ravel()
        self._host["num_committed"].array[:] = batch.num_committed
        self._host["write_index"].array[:] = batch.write_index

    def _enqueue(self, shape: _Shape) -> None:
        """Enqueue on the stream, in this order: the copies in, the forward, the copies out."""
        slots = self.num_slots
        sizes = {"input_ids": slots * shape.block_size, "num_committed": slots, "write_index": slots}
        for name, count in sizes.items():
            host, device = self._host[name].address, self._addresses[name]
            self._cuda.copy(device, host, count * INT64, "to device", self._stream)
        self._execute(shape)
        for name, count in {"next_ids": slots * shape.head_size, "num_accepted": slots}.items():
            host, device = self._host[name].address, self._addresses[name]
            self._cuda.copy(host, device, count * INT64, "to host", self._stream)

    def _execute(self, shape: _Shape) -> None:
        """Enqueue the forward alone. It uses the values that the device buffers have when it runs."""
        if not self._context(shape).execute_async_v3(int(self._stream)):
            raise EngineError(self._log.explain(f"TensorRT failed in a forward of {shape}"))

    def _capture(self, shape: _Shape) -> None:
        """Record the forward that was just enqueued. TensorRT must have run it once before.

        Prefill chunks are not recorded. They are wide enough to hide their launches, and they have many lengths.
        """
        if not self._cuda_graphs or not self._has_few_shapes(shape.profile):
            return
        if self._kernels and not self._context(shape).is_stream_capturable(int(self._stream)):
            raise EngineError(self._log.explain(f"TensorRT for RTX cannot record a forward of {shape} as a CUDA graph"))
        with self._cuda.capture(self._stream) as captured:
            self._enqueue(shape)
        self._graphs[shape] = captured[0]

    def _has_few_shapes(self, profile: int) -> bool:
        return profile != PREFILL or self.fixed_shapes is not None

    def _context(self, shape: _Shape) -> Any:
        """The execution context of a profile, set to a shape."""
        context = self._contexts.get(shape.profile)
        if context is None:
            context = self._contexts[shape.profile] = self._make_context(shape.profile)
        if self._bound.get(shape.profile) != shape:
            if not self.fixed_shapes:
                self._set_shapes(context, shape)
            self._bound[shape.profile] = shape
        return context

    def _make_context(self, profile: int) -> Any:
        if self._kernels:
            context = self._kernels.make_context(has_few_shapes=self._has_few_shapes(profile))
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(self._log.explain("TensorRT makes no execution context"))
        context.set_device_memory(self._scratch, self._scratch_size)
        if not context.set_optimization_profile_async(profile, int(self._stream)):
            raise EngineError(self._log.explain(f"TensorRT does not take optimization profile {profile}"))
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if not context.set_tensor_address(name, self._addresses[name]):
                raise EngineError(self._log.explain(f"TensorRT does not take the address of {name}"))
        return context

    def _set_shapes(self, context: Any, shape: _Shape) -> None:
        lengths = {"B": self.num_slots, "n": shape.block_size, "S": shape.kv_length, "h": shape.head_size}
        for spec in self._inputs:
            dims = tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)
            if not context.set_input_shape(spec.name, dims):
                raise EngineError(self._log.explain(f"the plan does not take {spec.name} of shape {list(dims)}"))
