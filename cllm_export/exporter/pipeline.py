"""Checkpoint to bundle, from the first check to the exchange with what was there before."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from torch import Tensor

from cllm_export.bundle import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    GREEDY_GRAPH,
    LOOKAHEAD_GRAPH,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    Bundle,
    FileEntry,
    GraphEntry,
    Manifest,
    Progress,
    TrainedWith,
    check_output,
    describe_files,
    open_bundle,
    require_one_of,
    staged_output,
    write_manifest,
)
from cllm_export.contract import BYTES, KV_DTYPE, PRECISIONS, FixedShapes, Geometry, Precision, require_at_least
from cllm_export.errors import OptionError
from cllm_export.exporter.adapter import Adapter, open_source
from cllm_export.exporter.checkpoint import Checkpoint, TensorInfo, default_max_length, truncated_config
from cllm_export.exporter.gptq import factor_bytes
from cllm_export.exporter.graph import DecoderGraph, WeightSource
from cllm_export.exporter.layers import TRACED_PERIODS, repeat_layers, repeated_period
from cllm_export.exporter.linking import LINKED_PASSES
from cllm_export.exporter.lint import ONNXRUNTIME_OPERATORS, require_clean
from cllm_export.exporter.lookahead import derive_lookahead, lookahead_obstacle
from cllm_export.exporter.memory import plan_memory, watched_memory
from cllm_export.exporter.passes import PASSES, Pass, pin_shapes, run_passes, state_contract
from cllm_export.exporter.quantize import QuantizeOptions, quantize
from cllm_export.exporter.smoke import require_sound, smoke_bytes
from cllm_export.exporter.static_layers import ColumnMaximum
from cllm_export.exporter.stream import Piece, Use, rows_of, stream_files, stream_tensors
from cllm_export.exporter.trace import check_tensors, geometry_of, trace_greedy
from cllm_export.exporter.weights import (
    ENGINE_DTYPE,
    Layout,
    WeightsFile,
    attach_weights,
    check_dtypes,
    is_linkable,
    plan_weights,
    require_space,
)
from cllm_export.linked import WEIGHTS_MODES, LinkedFile, WeightsMode
from cllm_export.quantization import ENGINES
from cllm_export.runtime.ort_engine import available_threads
from cllm_export.scales import Scales, open_scales

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
MIN_MAX_BLOCK_SIZE = 64
"""Decode forwards of up to this many tokens fit the cache of every bundle with symbolic shapes."""

MIN_MAX_LENGTH = 2
_TEXT_BYTES = 1 << 16
"""What a bundle takes besides its weights, at the least."""

GRAPH_FILES = {GREEDY_GRAPH: "model.onnx", LOOKAHEAD_GRAPH: "lookahead.onnx"}
TOOLS = ("cllm-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What ``cllm-export build`` lets the user choose."""

    block_size: int | None = None
    """n; by default what the model was trained with, else 16."""
    max_length: int | None = None
    """Prompt plus new tokens; by default the model's own length, capped at 2048."""
    batch_size: int = 1
    precision: Precision = "fp32"
    """The dtype of what is computed and of the KV cache."""
    quantize: QuantizeOptions | None = None
    """How linear layers are quantised; by default they are not."""
    fixed_shapes: bool = False
    trained_with: TrainedWith | None = None
    """Overrides the ``cllm`` section of the checkpoint's config."""
    weights: WeightsMode | None = None
    """By default ``link`` where every tensor has the engine's dtype already, else ``copy``."""
    max_memory: int | None = None
    """Bytes of anonymous memory that the build must stay under."""
    base: Path | None = None
    """The checkpoint that an adapter is for; by default the one that it names."""
    num_layers: int | None = None
    """The first so many layers alone, for debugging."""
    lookahead: bool = False
    """Add the lookahead graph. A model that can have none gets its greedy graph alone, and the report says why."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_length", "batch_size", "num_layers", "max_memory"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_one_of("precision", self.precision, PRECISIONS)
        if self.weights is not None:
            require_one_of("weights", self.weights, WEIGHTS_MODES)
        if self.quantize and self.precision != "fp32" and "tensorrt" not in self.quantize.engines:
            raise OptionError(
                f"{self.quantize.scheme} for ONNX Runtime computes in fp32, got {self.precision}: leave --compute out"
                f"{', or give --quantize-for tensorrt' if self.quantize.scheme == 'int4' else ''}"
            )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did and what it took, JSON-ready by ``vars``."""

    weights: WeightsMode
    reason: str
    """Why the weights were linked or copied."""
    graphs: tuple[str, ...]
    """Names of the bundle's graphs."""
    lookahead_refused: str | None
    """Why there is no lookahead graph, where one was asked for."""
    seconds: dict[str, float]
    """By stage. Of linked weights, ``scan`` runs alongside ``trace`` and ``passes``."""
    predicted_peak: int
    """Bytes of anonymous memory, as predicted before the work."""
    peak: int
    """As it was; 0 where the system does not say."""
    bytes_written: int
    bytes_linked: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle, and the report of its build."""

    bundle: Bundle
    report: BuildReport


def build(
    checkpoint_path: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """``export``, for those who need no report."""
    return export(checkpoint_path, output, options, force=force, progress=progress).bundle


def export(
    checkpoint_path: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Export:
    """Export a checkpoint into a bundle; the old bundle at ``output`` stays whole until the new one replaces it.

    ``say`` is told, a line at a time, what was decided and what each stage took.

    Raises:
        OutputError: the output exists (and ``force`` is not set), cannot be written or does not fit the disk.
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        OptionError: an option is out of range for this model.
        GraphError: the exported graph breaks a rule; nothing is written.
    """
    options = options or BuildOptions()
    output = Path(output)
    check_output(output, force=force)
    with watched_memory() as memory:
        work = _Work(options, output, Stages(say or (lambda _: None), progress or (lambda *_: None)))
        report = work.run(Path(checkpoint_path), force=force)
    report = replace(report, peak=memory.peak)
    work.stages.say(f"peak memory {memory.peak / 1e6:,.0f} MB (predicted {report.predicted_peak / 1e6:,.0f} MB)")
    return Export(bundle=open_bundle(output), report=report)


class Stages:
    """Times the stages of a build, and says what each took."""

    def __init__(self, say: Callable[[str], None], progress: Progress) -> None:
        self.say = say
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 1)
        started = perf_counter()
        yield
        self.took(name, perf_counter() - started)

    def took(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 3)
        self.say(f"{name:<12}{seconds:8.2f} s")


class _Work:
    """One build: the state its stages share."""

    def __init__(self, options: BuildOptions, output: Path, stages: Stages) -> None:
        self._options = options
        self._output = output
        self.stages = stages

    def run(self, path: Path, *, force: bool) -> BuildReport:
        options, stages = self._options, self.stages
        with stages.stage("checkpoint"):
            checkpoint, adapter = open_source(path, options.base, max_length=options.max_length)
            if options.num_layers is not None:
                checkpoint = checkpoint.with_layers(options.num_layers)
            settings = settle(options, checkpoint)
            wanted = check_tensors(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
            tensors = {name: info for name, info in checkpoint.tensors.items() if name in wanted}
            check_dtypes(tensors)
        mode, reason = choose_weights(options, tensors, adapter)
        memory = plan_memory(
            options.max_memory,
            needed=smoke_bytes(tensors) if options.quantize else 0,
            beside=factor_bytes(tensors) if options.quantize and options.quantize.is_gptq else 0,
        )
        stages.say(f"weights: {mode}, because {reason}")
        stages.say(f"predicted peak memory {memory.peak / 1e6:,.0f} MB")
        self._require_early_space(mode, tensors)
        changed = set(adapter.matrices) if adapter else set()
        with _Scan(checkpoint, tensors, memory.piece, stages) as scan:
            if mode == "link":
                scan.start()
            scales = open_scales(options.quantize.scales) if options.quantize and options.quantize.scales else None
            graph = _make_graph(checkpoint, settings, stages, link=mode == "link")
            self._quantize(graph, checkpoint, adapter, scales)
            _finish(graph, settings, stages)
            graphs = {GREEDY_GRAPH: graph}
            refused = self._add_lookahead(graphs, checkpoint, settings)
            layout = plan_weights(graph, checkpoint.tensors, link=mode == "link", changed=changed)
            with staged_output(self._output, force=force) as staging:
                require_space(staging, layout.size + _TEXT_BYTES, self._output)
                weights = WeightsFile(staging / WEIGHTS_NAME, layout, memory.stage, adapter.merge if adapter else None)
                with stages.stage("weights"), weights.filled():
                    for name, value in sorted(graph.constants.items()):
                        weights.put_constant(name, value)
                    if mode == "link":
                        stream_tensors(
                            checkpoint.tensors, sorted(layout.parts), piece_bytes=memory.piece, use=weights.put
                        )
                    else:
                        scan.run(weights.put)
                    known = {WEIGHTS_NAME: weights.sha256()}
                sums = scan.result()
                if scales:
                    scales.require_checkpoint(checkpoint.fingerprint(sums))
                with stages.stage("bundle"):
                    for name, each in graphs.items():
                        attach_weights(each, layout)
                        _write_graph(each, name, staging)
                    _copy_text_files(checkpoint, staging)
                    files = describe_files(staging, known)
                    write_manifest(staging, _manifest(checkpoint, settings, graphs, layout, files, sums))
                if options.quantize:
                    self._require_sound(staging, checkpoint, adapter)
                written = perf_counter()
            stages.took("to disk", perf_counter() - written)
        return BuildReport(
            weights=mode,
            reason=reason,
            graphs=tuple(graphs),
            lookahead_refused=refused,
            seconds=stages.seconds,
            predicted_peak=memory.peak,
            peak=0,
            bytes_written=sum(entry.size for entry in files.values()),
            bytes_linked=sum(weight.length for weight in layout.linked.values()),
        )

    def _quantize(
        self, graph: DecoderGraph, checkpoint: Checkpoint, adapter: Adapter | None, scales: Scales | None
    ) -> None:
        if self._options.quantize is None:
            return
        with self.stages.stage("quantize"):
            quantize(
                graph,
                self._options.quantize,
                num_layers=int(checkpoint.config.num_hidden_layers),
                scales=scales,
                maximum=_column_maximum(checkpoint, adapter),
            )
            graph.drop_unused_weights()

    def _add_lookahead(self, graphs: dict[str, DecoderGraph], checkpoint: Checkpoint, settings: Settings) -> str | None:
        """Derive the lookahead graph where it was asked for; why there is none, where there can be none."""
        if not self._options.lookahead:
            return None
        obstacle = lookahead_obstacle(
            checkpoint.config, max_length=settings.max_length, fixed_shapes=settings.fixed is not None
        )
        if obstacle is not None:
            self.stages.say(f"no lookahead graph: {obstacle}")
            return obstacle
        with self.stages.stage("lookahead"):
            graphs[LOOKAHEAD_GRAPH] = graph = derive_lookahead(graphs[GREEDY_GRAPH], settings.geometry)
            _lint(graph, ir.serde.serialize_model(graph.model))
        return None

    def _require_sound(self, staging: Path, checkpoint: Checkpoint, adapter: Adapter | None) -> None:
        """Let no quantised bundle take its place that does not compute its model any more."""
        with self.stages.stage("smoke"):
            smoke = require_sound(open_bundle(staging), checkpoint, adapter, threads=available_threads())
        self.stages.say(
            f"of {smoke.tokens} random tokens {smoke.flips} are followed by another token than before; "
            f"the last layer is off by {smoke.distance:.1%}"
        )

    def _require_early_space(self, mode: WeightsMode, tensors: Mapping[str, TensorInfo]) -> None:
        """Before the trace: a copy takes at least what its values take, quantised ones less than any dtype's."""
        values = sum(math.prod(info.shape) for info in tensors.values()) if mode == "copy" else 0
        each = 0 if self._options.quantize else BYTES[KV_DTYPE[self._options.precision]]
        parent = next(path for path in Path(os.path.abspath(self._output)).parents if path.exists())
        require_space(parent, values * each + _TEXT_BYTES, self._output)


class _Scan:
    """The pass over the checkpoint's files: alongside the trace where weights are linked, else as they are copied."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], piece_bytes: int, stages: Stages
    ) -> None:
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._piece_bytes = piece_bytes
        self._stages = stages
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[dict[Path, str]] | None = None
        self._seconds = 0.0
        self._sums: dict[Path, str] = {}

    def __enter__(self) -> _Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def start(self) -> None:
        self._running = self._pool.submit(self._read)

    def run(self, use: Use) -> None:
        self._sums = self._read(use)

    def result(self) -> dict[Path, str]:
        """sha256 of every weight file."""
        if self._running is not None:
            started = perf_counter()
            self._sums = self._running.result()
            self._stages.took("scan", self._seconds)
            self._stages.seconds["waiting"] = round(perf_counter() - started, 3)
        return self._sums

    def _read(self, use: Use | None = None) -> dict[Path, str]:
        started = perf_counter()
        sums = stream_files(
            self._checkpoint.weight_files,
            self._checkpoint.tensors,
            piece_bytes=self._piece_bytes,
            scanned=self._tensors.keys(),
            use=use,
            progress=lambda done, total: self._stages.progress("weights", done, total) if use else None,
            stop=self._stop,
        )
        self._seconds = perf_counter() - started
        return sums


def choose_weights(
    options: BuildOptions, tensors: Mapping[str, TensorInfo], adapter: Adapter | None
) -> tuple[WeightsMode, str]:
    """Whether weights are linked or copied, and why.

    Raises:
        OptionError: linking was asked for, and nothing can be linked.
    """
    wanted = ENGINE_DTYPE[options.precision]
    kept = [name for name, info in tensors.items() if is_linkable(info, options.precision)]
    other = sorted({info.dtype for name, info in tensors.items() if name not in kept})
    if options.weights == "link" and not kept:
        raise OptionError(
            f"no weight can be linked at --precision {options.precision}, which takes {wanted}: the checkpoint holds "
            f"{', '.join(other)}; use --weights copy, or the precision that it has"
        )
    if options.quantize is not None:
        if options.weights == "link":
            raise OptionError(
                f"no weight can be linked at --precision {options.quantize.scheme}, which stores them rounded: "
                "leave --weights out"
            )
        return "copy", f"{options.quantize.scheme} stores them rounded"
    if options.weights is not None:
        return options.weights, f"--weights {options.weights} was given"
    if adapter is not None:
        return "copy", "an adapter is merged into them"
    if len(kept) < len(tensors):
        return "copy", f"{options.precision} takes {wanted} and the checkpoint holds {', '.join(other)}"
    return "link", f"the checkpoint holds them in {wanted} already; the bundle needs it to stay where it is"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options with every default settled for one checkpoint."""

    block_size: int
    max_length: int
    batch_size: int
    precision: Precision
    trained_with: TrainedWith | None
    geometry: Geometry
    fixed: FixedShapes | None


def settle(options: BuildOptions, checkpoint: Checkpoint) -> Settings:
    trained_with = options.trained_with or checkpoint.trained_with
    trained_block = trained_with.block_size if trained_with else DEFAULT_BLOCK_SIZE
    block_size = options.block_size or trained_block
    limit = int(checkpoint.config.max_position_embeddings)
    max_length = options.max_length or default_max_length(checkpoint.config)
    if max_length < MIN_MAX_LENGTH:
        raise OptionError(f"--max-length must be at least {MIN_MAX_LENGTH}, a prompt token and a new one")
    if max_length > limit:
        raise OptionError(f"--max-length {max_length} is beyond the model's own {limit} positions")
    if block_size > max_length:
        origin = "--block-size" if options.block_size else "the block size it was trained with,"
        raise OptionError(f"{origin} {block_size} is above the max length {max_length}; choose a smaller --block-size")
    max_block_size = block_size if options.fixed_shapes else max(block_size, MIN_MAX_BLOCK_SIZE)
    geometry = geometry_of(checkpoint.config, max_length=max_length, max_block_size=max_block_size)
    fixed = (
        FixedShapes(batch_size=options.batch_size, block_size=block_size, kv_extent=geometry.cache_length)
        if options.fixed_shapes
        else None
    )
    return Settings(
        block_size=block_size,
        max_length=max_length,
        batch_size=options.batch_size,
        precision=options.precision,
        trained_with=trained_with,
        geometry=geometry,
        fixed=fixed,
    )


def _column_maximum(checkpoint: Checkpoint, adapter: Adapter | None) -> ColumnMaximum:
    """Reads the largest magnitude of each column of a tensor, merged with the adapter if there is one."""

    def maximum(name: str) -> Tensor:
        values, info = checkpoint.read(name), checkpoint.tensors[name]
        if adapter:
            values = adapter.merge(Piece(name, info, 0, rows_of(info), memoryview(b"")), values)
        return values.float().abs().amax(dim=0)

    return maximum


def _make_graph(checkpoint: Checkpoint, settings: Settings, stages: Stages, *, link: bool) -> DecoderGraph:
    passes = LINKED_PASSES if link else PASSES
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    period, total = repeated_period(checkpoint.config, shapes), settings.geometry.num_layers
    traced = total if period is None else TRACED_PERIODS * period
    graph = _trace(checkpoint.config, settings, traced, passes, stages)
    if period is not None and not repeat_layers(graph, period, total):
        log.info("layers are not alike: tracing every one")
        graph = _trace(checkpoint.config, settings, total, passes, stages)
    return graph


def _finish(graph: DecoderGraph, settings: Settings, stages: Stages) -> None:
    """State the contract, and hold the graph to the lint."""
    with stages.stage("lint"):
        if settings.fixed:
            pin_shapes(graph, settings.geometry, settings.fixed)
        state_contract(graph, settings.geometry, settings.fixed)
        _lint(graph, ir.serde.serialize_model(graph.model))  # the rules need no weights: find out before writing any


def _trace(
    config: PretrainedConfig, settings: Settings, num_layers: int, passes: Sequence[Pass], stages: Stages
) -> DecoderGraph:
    """The graph of the first layers, after every pass."""
    with stages.stage("trace"):
        short, geometry = truncated_config(config, num_layers), replace(settings.geometry, num_layers=num_layers)
        trace = trace_greedy(short, geometry, settings.precision)
    graph = DecoderGraph(
        model=trace.model,
        precision=settings.precision,
        weights={name: WeightSource(tensors=(name,)) for name in trace.checkpoint_tensors},
        constants=dict(trace.constants),
    )
    with stages.stage("passes"):
        run_passes(graph, passes)
    return graph


def _lint(graph: DecoderGraph, proto: onnx.ModelProto) -> None:
    """Hold the graph to TensorRT's rules, but for what quantises a graph that is not meant for it."""
    engines = graph.quantization.engines if graph.quantization else ENGINES
    require_clean(proto, unjudged=() if "tensorrt" in engines else ONNXRUNTIME_OPERATORS)


def _write_graph(graph: DecoderGraph, name: str, directory: Path) -> None:
    graph.model.producer_name, graph.model.graph.name = "cllm-export", name
    proto = ir.serde.serialize_model(graph.model)
    _lint(graph, proto)
    onnx.save(proto, directory / GRAPH_FILES[name])
    log.info("%s: %d nodes", GRAPH_FILES[name], len(proto.graph.node))


def _copy_text_files(checkpoint: Checkpoint, directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_bytes(checkpoint.tokenizer_json)
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(checkpoint.path / GENERATION_CONFIG_NAME, directory / GENERATION_CONFIG_NAME)
    if checkpoint.chat_template is not None:
        (directory / CHAT_TEMPLATE_NAME).write_text(checkpoint.chat_template, encoding="utf-8")


def _manifest(
    checkpoint: Checkpoint,
    settings: Settings,
    graphs: Mapping[str, DecoderGraph],
    layout: Layout,
    files: dict[str, FileEntry],
    sums: dict[Path, str],
) -> Manifest:
    used = {weight.file for weight in layout.linked.values()}
    linked = {
        path.name: LinkedFile(path=os.path.abspath(path), size=path.stat().st_size, sha256=digest)
        for path, digest in sums.items()
        if path.name in used
    }
    return Manifest(
        family=checkpoint.family,
        graphs={name: GraphEntry(file=GRAPH_FILES[name], fixed_shapes=settings.fixed) for name in graphs},
        geometry=settings.geometry,
        block_size=settings.block_size,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        precision=settings.precision,
        eos_token_ids=checkpoint.eos_token_ids,
        pad_token_id=checkpoint.pad_token_id,
        trained_with=settings.trained_with,
        special_tokens=checkpoint.special_tokens,
        checkpoint_fingerprint=checkpoint.fingerprint(sums),
        tool_versions=_tool_versions(),
        files=files,
        linked_files=linked,
        linked_weights=layout.linked,
        quantization=graphs[GREEDY_GRAPH].quantization,
    )


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
