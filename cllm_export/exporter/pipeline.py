"""Builds a bundle from a checkpoint, from the first check until the new bundle replaces the old one."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch import Tensor

from cllm_export.bundle.contract import BYTES, KV_DTYPE
from cllm_export.bundle.linked_weights import WeightsMode
from cllm_export.bundle.manifest import (
    GREEDY_GRAPH,
    LOOKAHEAD_GRAPH,
    MANIFEST_NAME,
    TENSORRT_GRAPH,
    WEIGHTS_NAME,
    Bundle,
    describe_files,
    open_bundle,
    tensorrt_graph_of,
    write_manifest,
)
from cllm_export.bundle.quantization import ROTATED_TITLES, Agreement
from cllm_export.bundle.scales import Scales, open_scales
from cllm_export.bundle.storage import check_output, staged_output
from cllm_export.checks import names_options
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.adapter import Adapter, open_source
from cllm_export.exporter.checkpoint.families import truncated_config
from cllm_export.exporter.checkpoint.files import TensorInfo, is_gguf
from cllm_export.exporter.checkpoint.read import EMBEDDING, Checkpoint
from cllm_export.exporter.checkpoint.stream import Piece, Use, rows_of, stream_files, stream_tensors
from cllm_export.exporter.gguf.convert import imported
from cllm_export.exporter.graph.layers import TRACED_PERIODS, repeat_layers, repeated_period
from cllm_export.exporter.graph.linking import LINKED_PASSES
from cllm_export.exporter.graph.lookahead import derive_lookahead, lookahead_obstacle
from cllm_export.exporter.graph.model import DecoderGraph, WeightSource
from cllm_export.exporter.graph.passes import PASSES, Pass, run_passes
from cllm_export.exporter.graph.rotate import RotationPlan, rotate
from cllm_export.exporter.graph.tensorrt_graph import derive_tensorrt_graph
from cllm_export.exporter.graph.trace import check_tensors, trace_greedy
from cllm_export.exporter.options import BuildOptions, refuse_link
from cllm_export.exporter.parity.smoke import doubt, measure_agreement, smoke_bytes
from cllm_export.exporter.quantize.gptq import factor_bytes
from cllm_export.exporter.quantize.rewrite import quantize
from cllm_export.exporter.quantize.scheme import ColumnMaximum
from cllm_export.exporter.quantize.schemes import SCHEMES
from cllm_export.exporter.settle import Settings, require_linkable, settle
from cllm_export.exporter.stages import Stages
from cllm_export.exporter.weights.memory import MemoryPlan, plan_memory, watched_memory
from cllm_export.exporter.weights.weights import (
    WeightsFile,
    attach_weights,
    check_dtypes,
    gathered_bytes,
    plan_weights,
    require_space,
)
from cllm_export.exporter.write_bundle import copy_text_files, finish_graph, lint_graph, make_manifest, write_graph
from cllm_export.progress import Progress, Voice
from cllm_export.runtime.engines.machine import available_threads

if TYPE_CHECKING:
    from transformers import PretrainedConfig


log = logging.getLogger(__name__)

_TEXT_BYTES = 1 << 16
"""Lower bound on the bytes of a bundle besides its weights."""


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did, and its cost. ``vars`` of it can be written as JSON."""

    weights: WeightsMode
    graphs: tuple[str, ...]
    """Names of the bundle's graphs."""
    lookahead_refused: str | None
    """Why there is no lookahead graph although one was requested; None otherwise."""
    seconds: dict[str, float]
    """Seconds of each stage. With linked weights, ``scan`` runs in parallel with ``trace`` and ``passes``."""
    predicted_peak: int
    """Predicted peak of anonymous memory, in bytes."""
    peak: int
    """Measured peak of anonymous memory, in bytes; 0 where the system does not report it."""
    agreement: dict[str, Any] | None
    """Tokens of general text for which a quantised bundle predicts the model's own token: ``equal``, ``of``, ``share``.
    None if nothing was quantised."""
    bytes_written: int
    bytes_linked: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle, and the report of its build."""

    bundle: Bundle
    report: BuildReport


@names_options
def build(
    checkpoint_path: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Same as ``export``, but returns only the bundle."""
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
    """Export a checkpoint or a GGUF file into a bundle. An old bundle stays intact until the new one replaces it.

    ``say`` receives the decisions and the seconds of each stage, one line per call.

    Raises:
        OutputError: the output exists (and ``force`` is not set), cannot be written or does not fit on the disk.
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        OptionError: an option is out of range for this model.
        GraphError: the exported graph breaks a rule; nothing is written.
    """
    options = options or BuildOptions()
    path, output = Path(checkpoint_path), Path(output)
    check_output(output, force=force, marker=MANIFEST_NAME)
    if is_gguf(path):
        refuse_link(path, options)
        voice = Voice(progress=progress or (lambda *_: None))
        with watched_memory() as whole, imported(path, output, voice=voice) as checkpoint:
            done = export(checkpoint, output, options, force=force, progress=progress, say=say)
        return replace(done, report=replace(done.report, peak=max(whole.peak, done.report.peak)))
    with watched_memory() as memory:
        work = _Work(options, output, Stages(say or (lambda _: None), progress or (lambda *_: None)))
        report = work.run(path, force=force)
    report = replace(report, peak=memory.peak)
    work.stages.say(f"peak memory {memory.peak / 1e6:,.0f} MB (predicted {report.predicted_peak / 1e6:,.0f} MB)")
    return Export(bundle=open_bundle(output), report=report)


class _Work:
    """The state that the stages of one build share."""

    def __init__(self, options: BuildOptions, output: Path, stages: Stages) -> None:
        self._options = options
        self._output = output
        self.stages = stages

    def run(self, path: Path, *, force: bool) -> BuildReport:
        options, stages = self._options, self.stages
        checkpoint, adapter, settings, tensors = self._open(path)
        is_linked = options.weights == "link"
        if is_linked:
            require_linkable(options, tensors)
        memory = self._plan_memory(tensors)
        stages.say(f"weights: {options.weights}")
        stages.say(f"predicted peak memory {memory.peak / 1e6:,.0f} MB")
        self._require_early_space(tensors)
        changed = set(adapter.matrices) if adapter else set()
        with _Scan(checkpoint, tensors, memory.piece, stages) as scan:
            if is_linked:
                scan.start()
            scales = open_scales(options.quantize.scales) if options.quantize and options.quantize.scales else None
            graph = _make_graph(checkpoint, settings, stages, link=is_linked)
            self._quantize(graph, checkpoint, adapter, scales)
            finish_graph(graph, settings, stages)
            graphs = {GREEDY_GRAPH: graph}
            refused = self._add_lookahead(graphs, checkpoint, settings)
            self._add_tensorrt_graph(graphs, settings)
            layout = plan_weights(graph, checkpoint.tensors, link=is_linked, changed=changed)
            with staged_output(self._output, force=force, marker=MANIFEST_NAME) as staging:
                require_space(staging, layout.size + _TEXT_BYTES, self._output)
                weights = WeightsFile(staging / WEIGHTS_NAME, layout, memory.stage, adapter.merge if adapter else None)
                with stages.stage("weights"), weights.filled():
                    for name, value in sorted(graph.constants.items()):
                        weights.put_constant(name, value)
                    if is_linked:
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
                        write_graph(each, name, staging, is_parsed=name == tensorrt_graph_of(graphs))
                    copy_text_files(checkpoint, staging)
                    files = describe_files(staging, known)
                    write_manifest(staging, make_manifest(checkpoint, settings, graphs, layout, files, sums))
                agreement = self._judge(staging, checkpoint, adapter)
                written = perf_counter()
            stages.took("to disk", perf_counter() - written)
        return BuildReport(
            weights=options.weights,
            graphs=tuple(graphs),
            lookahead_refused=refused,
            seconds=stages.seconds,
            predicted_peak=memory.peak,
            peak=0,
            agreement=agreement.to_dict() if agreement else None,
            bytes_written=sum(entry.size for entry in files.values()),
            bytes_linked=sum(weight.length for weight in layout.linked.values()),
        )

    def _open(self, path: Path) -> tuple[Checkpoint, Adapter | None, Settings, dict[str, TensorInfo]]:
        """The checkpoint, its adapter, the settled options, and the checkpoint tensors that the model uses."""
        options = self._options
        with self.stages.stage("checkpoint"):
            checkpoint, adapter = open_source(path, options.base, max_length=options.max_length)
            if options.num_layers is not None:
                checkpoint = checkpoint.with_layers(options.num_layers)
            settings = settle(options, checkpoint)
            wanted = check_tensors(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
            tensors = {name: info for name, info in checkpoint.tensors.items() if name in wanted}
            check_dtypes(tensors)
        return checkpoint, adapter, settings, tensors

    def _plan_memory(self, tensors: Mapping[str, TensorInfo]) -> MemoryPlan:
        """The memory that each stage may use, in bytes, including the needs of quantisation."""
        quantize = self._options.quantize
        reads_gram = quantize is not None and quantize.scales is not None and SCHEMES[quantize.scheme].reads_gram
        return plan_memory(
            self._options.max_memory,
            needed=smoke_bytes(tensors) if quantize else 0,
            beside=(factor_bytes(tensors) if reads_gram else 0)
            + (gathered_bytes(tensors) if quantize is not None and quantize.rotate else 0),
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
                rotation=self._rotate(graph, checkpoint) if self._options.quantize.rotate else None,
            )
            graph.drop_unused_weights()

    def _rotate(self, graph: DecoderGraph, checkpoint: Checkpoint) -> RotationPlan:
        """Rotate the residual stream of a graph, and its values if that is possible."""
        quantize = self._options.quantize
        assert quantize is not None
        rotation = rotate(graph, checkpoint.read)
        if reason := rotation.refused.get("residual"):
            raise OptionError(
                f"rotate is for models whose residual stream can be rotated, and in this one {reason}: leave it out",
                fields=("rotate",),
            )
        for part, reason in rotation.refused.items():
            self.stages.say(f"not rotated: the {ROTATED_TITLES[part]}, since {reason}")
        if rotation.unties and not quantize.head:
            size = math.prod(checkpoint.tensors[EMBEDDING].shape) * BYTES[KV_DTYPE[self._options.precision]]
            self.stages.say(
                f"the head no longer shares the embedding's matrix, which takes {size / 1e6:,.1f} MB more; "
                "quantised it takes less"
            )
        return rotation

    def _add_lookahead(self, graphs: dict[str, DecoderGraph], checkpoint: Checkpoint, settings: Settings) -> str | None:
        """Derive the lookahead graph if it was requested. Returns the reason if the model cannot have one."""
        if not self._options.lookahead:
            return None
        obstacle = lookahead_obstacle(checkpoint.config, max_length=settings.max_length)
        if obstacle is not None:
            self.stages.say(f"no lookahead graph: {obstacle}")
            return obstacle
        with self.stages.stage("lookahead"):
            graphs[LOOKAHEAD_GRAPH] = graph = derive_lookahead(graphs[GREEDY_GRAPH], settings.geometry)
            lint_graph(graph, ir.serde.serialize_model(graph.model), is_parsed=False)
        return None

    def _add_tensorrt_graph(self, graphs: dict[str, DecoderGraph], settings: Settings) -> None:
        """Derive the graph for TensorRT, if this bundle is for TensorRT."""
        greedy = graphs[GREEDY_GRAPH]
        if greedy.quantization and "tensorrt" not in greedy.quantization.engines:
            return
        with self.stages.stage("tensorrt"):
            graph = derive_tensorrt_graph(greedy, settings.geometry, settings.fixed)
            lint_graph(graph, ir.serde.serialize_model(graph.model), is_parsed=True)
            graphs[TENSORRT_GRAPH] = graph

    def _judge(self, staging: Path, checkpoint: Checkpoint, adapter: Adapter | None) -> Agreement | None:
        """Measure how far a quantised bundle agrees with its model, and record it. Refuse a bad one."""
        quantize = self._options.quantize
        if quantize is None:
            return None
        bundle, least = open_bundle(staging), quantize.min_agreement
        with self.stages.stage("agreement"):
            agreement, perplexity = measure_agreement(
                bundle,
                checkpoint,
                adapter,
                least=SCHEMES[quantize.scheme].min_agreement if least is None else least,
                threads=available_threads(),
                progress=self.stages.progress,
            )
        self.stages.say(f"the bundle predicts the model's own token for {agreement} tokens of general text")
        if warning := doubt(agreement, perplexity):
            self.stages.say(warning)
        assert bundle.manifest.quantization is not None
        record = replace(bundle.manifest.quantization, agreement=agreement)
        write_manifest(staging, replace(bundle.manifest, quantization=record))
        return agreement

    def _require_early_space(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Check the disk space before the trace, with a lower bound on the size of the bundle.

        Copied weights need at least the bytes of their values. Quantised weights count as 0 bytes here, because their
        size is below that of any dtype.
        """
        is_copied = self._options.weights == "copy"
        values = sum(math.prod(info.shape) for info in tensors.values()) if is_copied else 0
        each = 0 if self._options.quantize else BYTES[KV_DTYPE[self._options.precision]]
        parent = next(path for path in Path(os.path.abspath(self._output)).parents if path.exists())
        require_space(parent, values * each + _TEXT_BYTES, self._output)


class _Scan:
    """Reads the checkpoint's files once: in parallel with the trace if weights are linked, else while copying them."""

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
        """The sha256 of every weight file."""
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


def _column_maximum(checkpoint: Checkpoint, adapter: Adapter | None) -> ColumnMaximum:
    """A function that gives the largest magnitude of each column of a tensor, after any adapter is merged."""

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


def _trace(
    config: PretrainedConfig, settings: Settings, num_layers: int, passes: Sequence[Pass], stages: Stages
) -> DecoderGraph:
    """The graph of the first ``num_layers`` layers, after every pass."""
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
