"""ONNX Runtime on a device, CUDA above all: buffers that stay on it, bound once for each shape, the cache in place.

The CPU's ``OrtEngine`` binds host arrays, which a GPU cannot write to. Here every input and output is an OrtValue on
the device: inputs are copied in, predictions out, and cache, positions and logits stay. On the device ``cpu`` the same
code runs without a GPU, which is how it is tested; on CUDA it has not run yet.

With CUDA graphs ONNX Runtime records each binding's forward and replays it: a graph has one set of shapes and
addresses, which is what a binding is. To record, it runs a forward several times over; that changes nothing, since a
forward writes the same rows again. Chunks of the prompt come in every length, and are not recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cllm_export.bundle.contract import KV_DTYPE, LOGITS, FixedShapes, Geometry, cache_names, check_forward
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.errors import EngineError, GpuError, MissingExtraError, OptionError
from cllm_export.runtime.engines.base import Forward
from cllm_export.runtime.engines.cuda import require_gpu
from cllm_export.runtime.engines.mapped_weights import MappedWeights
from cllm_export.runtime.engines.onnxruntime import settle_slots

if TYPE_CHECKING:
    import onnxruntime

Device = Literal["cuda", "cpu"]
PROVIDERS: dict[Device, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
ENABLE_GRAPHS = ("enable_cuda_graph", "1")
"""The provider's option for CUDA graphs."""
GRAPH_ID = "gpu_graph_id"
"""Entry of a run's options: which graph is recorded or replayed. 0 is ONNX Runtime's own."""
NO_GRAPH = "-1"
CHUNK = 128
SMALLEST_EXTENT = 256
ELEMENT_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}
"""As OrtValue takes them; numpy has no bfloat16, so that one goes by its ONNX number."""


class _Binding(NamedTuple):
    """One ``IOBinding`` and the device values that change or are read."""

    io: Any
    inputs: dict[str, Any]
    next_ids: Any
    logits: Any
    run_options: Any
    """None where nothing is recorded."""


class OrtDeviceEngine:
    """Runs one graph of a bundle on ONNX Runtime with every buffer on a device. See ``Engine`` for the calls.

    Args:
        bundle: an opened bundle.
        device: ``cuda``, which needs onnxruntime-gpu and a GPU; ``cpu`` for tests.
        num_slots: B; by default the bundle's batch size. A graph with fixed shapes has its own.
        cuda_graphs: have ONNX Runtime record the forward of each n, extent and set of outputs, in each thread that runs
            one, and replay it. It refuses a graph of which a node runs on the host.

    Raises:
        OptionError: CUDA graphs on another device.
        GpuError: no GPU, or an ONNX Runtime without its CUDA provider.
        EngineError: ONNX Runtime does not take the graph.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "cuda",
        graph: str = GREEDY_GRAPH,
        num_slots: int | None = None,
        cuda_graphs: bool = False,
        log_severity: int = 3,
    ) -> None:
        if cuda_graphs and device != "cuda":
            raise OptionError(f"cuda_graphs is for the device cuda, got {device!r}: leave it out")
        if device == "cuda":
            require_gpu()
        manifest = bundle.manifest
        self._device = device
        self._fixed = manifest.graphs[graph].fixed_shapes
        self._geometry = manifest.geometry
        self._num_slots = settle_slots(self._fixed, num_slots, manifest.batch_size)
        self._linked = MappedWeights(bundle)
        self._session = _make_session(
            str(bundle.graph_path(graph)), device, log_severity, self._linked, cuda_graphs=cuda_graphs
        )
        self._graph_ids = itertools.count(1) if cuda_graphs else None
        self.run_seconds = 0.0
        self._element_type = ELEMENT_TYPES[KV_DTYPE[manifest.precision]]
        shape = (self._num_slots, self._geometry.num_kv_heads, self._geometry.cache_length, self._geometry.head_dim)
        self.cache = {past: self._zeros(shape) for past, _ in cache_names(self._geometry.num_layers)}
        """The KV buffers [B, K, C, D] on the device, by past name."""
        self._counts = {name: self._int64((self._num_slots,)) for name in ("num_committed", "write_index")}
        self._num_accepted = self._int64((self._num_slots,))
        self._bindings: dict[tuple[int, int, int, bool], _Binding] = {}

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def prefill_chunk(self) -> int:
        return self._fixed.block_size if self._fixed else CHUNK

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
        size = len(input_ids[0])
        binding = self._run(input_ids, num_committed, write_index, head_size=size, with_logits=with_logits)
        logits = None
        if with_logits:
            logits = binding.logits.numpy().reshape(self._num_slots, size, self._geometry.vocab_size)
        return Forward(binding.next_ids.numpy().tolist(), self._num_accepted.numpy().tolist(), logits)

    def prefill(
        self, input_ids: Sequence[Sequence[int]], num_committed: Sequence[int], write_index: Sequence[int]
    ) -> None:
        head_size = len(input_ids[0]) if self._fixed else 1
        self._run(input_ids, num_committed, write_index, head_size=head_size)

    def close(self) -> None:
        """Let go of everything on the device. The engine cannot run afterwards."""
        self._bindings.clear()
        self.cache.clear()
        self._counts.clear()
        self._session = None

    def _run(
        self,
        input_ids: Sequence[Sequence[int]],
        num_committed: Sequence[int],
        write_index: Sequence[int],
        *,
        head_size: int,
        with_logits: bool = False,
    ) -> _Binding:
        if self._session is None:
            raise EngineError("this engine is closed; load the bundle again")
        if not len(input_ids) == len(num_committed) == len(write_index) == self._num_slots:
            raise EngineError(
                f"a forward needs a block, num_committed and write_index for each of {self._num_slots} slots"
            )
        binding = self._binding(len(input_ids[0]), head_size, write_index, with_logits)
        given = {"input_ids": input_ids, "num_committed": num_committed, "write_index": write_index}
        started = perf_counter()
        try:
            for name, values in given.items():
                binding.inputs[name].update_inplace(np.array(values, np.int64))
            self._session.run_with_iobinding(binding.io, binding.run_options)
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            advice = _advice(cuda_graphs=binding.run_options is not None)
            raise EngineError(f"ONNX Runtime failed in a forward on {self._device}: {error}{advice}") from error
        self.run_seconds += perf_counter() - started
        return binding

    def _binding(self, size: int, head_size: int, write_index: Sequence[int], with_logits: bool) -> _Binding:
        if self._fixed and size != self._fixed.block_size:
            raise EngineError(f"this graph is pinned to blocks of {self._fixed.block_size}, got {size}")
        extent = self._extent(max(write_index) + size)
        for start in write_index:
            check_forward(block_size=size, write_index=start, kv_extent=extent, geometry=self._geometry)
        key = (size, head_size, extent, with_logits)
        if key not in self._bindings:
            self._bindings[key] = self._bind(*key)
        return self._bindings[key]

    def _extent(self, needed: int) -> int:
        """Doubled from bucket to bucket: on a device each costs buffers, and a few rows too many cost little."""
        if self._fixed:
            return self._fixed.kv_extent
        return min(max(SMALLEST_EXTENT, 1 << (needed - 1).bit_length()), self._geometry.cache_length)

    def _bind(self, size: int, head_size: int, extent: int, with_logits: bool) -> _Binding:
        slots, io = self._num_slots, self._session.io_binding()
        inputs = {
            "input_ids": self._int64((slots, size)),
            **self._counts,
            "kv_positions": self._counting(extent),
            "head_rows": self._counting(head_size),
        }
        next_ids, logits = self._int64((slots, head_size)), None
        outputs = {"next_ids": next_ids, "num_accepted": self._num_accepted}
        if with_logits:
            logits = self._value((slots * head_size, self._geometry.vocab_size), np.float32)
            outputs[LOGITS] = logits
        for name, value in inputs.items():
            io.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            io.bind_ortvalue_output(name, value)
        for past, present in cache_names(self._geometry.num_layers):
            io.bind_ortvalue_input(past, self.cache[past])
            io.bind_ortvalue_output(present, self.cache[past])
        return _Binding(io, inputs, next_ids, logits, self._run_options(is_recorded=head_size == size))

    def _run_options(self, *, is_recorded: bool) -> Any:
        """Which graph a binding's runs are: its own, or none where it is a chunk of the prompt, which reads one row."""
        if self._graph_ids is None:
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(next(self._graph_ids)) if is_recorded else NO_GRAPH)
        return options

    def _value(self, shape: tuple[int, ...], element_type: Any) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type, self._device, 0)

    def _int64(self, shape: tuple[int, ...]) -> Any:
        return self._value(shape, np.int64)

    def _counting(self, count: int) -> Any:
        value = self._int64((count,))
        value.update_inplace(np.arange(count, dtype=np.int64))
        return value

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        """Zeroed once: a NaN in a dead row would leak, 0 * NaN being NaN."""
        value = self._value(shape, self._element_type)
        value.update_inplace(np.zeros(shape, np.uint16 if self._element_type == 16 else self._element_type))
        return value


def _advice(*, cuda_graphs: bool) -> str:
    """What to try where ONNX Runtime fails that was asked for graphs."""
    return "; it was asked for CUDA graphs: leave cuda_graphs out" if cuda_graphs else ""


def _make_session(path: str, device: Device, log_severity: int, linked: MappedWeights, *, cuda_graphs: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", extra="cuda") from None
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise GpuError(
            f"ONNX Runtime {onnxruntime.__version__} has no {provider}: it is the package for the CPU; "
            "replace it with: pip uninstall -y onnxruntime; pip install 'cllm-export[cuda]'"
        )
    options: onnxruntime.SessionOptions = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity
    linked.hand_to(options)
    try:
        asked = (provider, dict([ENABLE_GRAPHS])) if cuda_graphs else provider
        session = onnxruntime.InferenceSession(path, options, providers=[asked])
    except Exception as error:  # onnxruntime raises its own types, unrelated to each other
        advice = _advice(cuda_graphs=cuda_graphs)
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} does not load {path} on {device}: {error}{advice}"
        ) from error
    if provider not in session.get_providers():  # it goes on with the CPU alone, and says so only in its log
        raise GpuError(f"ONNX Runtime did not start its {provider}; see what is missing with: cllm-export doctor")
    return session
