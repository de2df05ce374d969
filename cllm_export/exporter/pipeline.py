"""Checkpoint to bundle, from the first check to the exchange with what was there before."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from cllm_export.bundle import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    GREEDY_GRAPH,
    TOKENIZER_NAME,
    Bundle,
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
from cllm_export.contract import FixedShapes, Geometry, Precision, require_at_least
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint import Checkpoint, default_max_length, open_checkpoint
from cllm_export.exporter.graph import DecoderGraph, WeightSource
from cllm_export.exporter.lint import require_clean
from cllm_export.exporter.passes import pin_shapes, run_passes, state_contract
from cllm_export.exporter.trace import check_tensors, geometry_of, trace_greedy
from cllm_export.exporter.weights import attach_weights, write_weights

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
MIN_MAX_BLOCK_SIZE = 64
"""Decode forwards of up to this many tokens fit the cache of every bundle with symbolic shapes."""

MIN_MAX_LENGTH = 2

GRAPH_FILE = "model.onnx"
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
    fixed_shapes: bool = False
    trained_with: TrainedWith | None = None
    """Overrides the ``cllm`` section of the checkpoint's config."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_length", "batch_size"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_one_of("precision", self.precision, ("fp32", "fp16"))


def build(
    checkpoint_path: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle; the old bundle at ``output`` stays whole until the new one replaces it.

    Raises:
        OutputError: the output exists (and ``force`` is not set) or cannot be written.
        CheckpointError: the checkpoint is missing, damaged or unsupported.
        OptionError: an option is out of range for this model.
        GraphError: the exported graph breaks a rule; nothing is written.
    """
    options = options or BuildOptions()
    output = Path(output)
    check_output(output, force=force)
    report = progress or (lambda *_: None)
    report("checkpoint", 0, 1)
    checkpoint = open_checkpoint(checkpoint_path, max_length=options.max_length)
    settings = settle(options, checkpoint)
    report("graph", 0, 1)
    graph = _make_graph(checkpoint, settings)
    with staged_output(output, force=force) as staging:
        written = write_weights(graph, checkpoint, staging, report)
        attach_weights(graph, written)
        _write_graph(graph, staging / GRAPH_FILE)
        _copy_text_files(checkpoint, staging)
        report("checksums", 0, 1)
        write_manifest(staging, _manifest(checkpoint, settings, staging))
    return open_bundle(output)


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


def _make_graph(checkpoint: Checkpoint, settings: Settings) -> DecoderGraph:
    check_tensors(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    trace = trace_greedy(checkpoint.config, settings.geometry, settings.precision)
    graph = DecoderGraph(
        model=trace.model,
        precision=settings.precision,
        weights={name: WeightSource(tensors=(name,)) for name in trace.checkpoint_tensors},
        constants=dict(trace.constants),
    )
    run_passes(graph)
    if settings.fixed:
        pin_shapes(graph, settings.geometry, settings.fixed)
    state_contract(graph, settings.geometry, settings.fixed)
    require_clean(ir.serde.serialize_model(graph.model))  # the rules need no weights: find out before writing any
    return graph


def _write_graph(graph: DecoderGraph, path: Path) -> None:
    graph.model.producer_name, graph.model.graph.name = "cllm-export", GREEDY_GRAPH
    proto = ir.serde.serialize_model(graph.model)
    require_clean(proto)
    onnx.save(proto, path)
    log.info("%s: %d nodes", path.name, len(proto.graph.node))


def _copy_text_files(checkpoint: Checkpoint, directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_bytes(checkpoint.tokenizer_json)
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(checkpoint.path / GENERATION_CONFIG_NAME, directory / GENERATION_CONFIG_NAME)
    if checkpoint.chat_template is not None:
        (directory / CHAT_TEMPLATE_NAME).write_text(checkpoint.chat_template, encoding="utf-8")


def _manifest(checkpoint: Checkpoint, settings: Settings, directory: Path) -> Manifest:
    return Manifest(
        family=checkpoint.family,
        graphs={GREEDY_GRAPH: GraphEntry(file=GRAPH_FILE, fixed_shapes=settings.fixed)},
        geometry=settings.geometry,
        block_size=settings.block_size,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        precision=settings.precision,
        eos_token_ids=checkpoint.eos_token_ids,
        pad_token_id=checkpoint.pad_token_id,
        trained_with=settings.trained_with,
        special_tokens=checkpoint.special_tokens,
        checkpoint_fingerprint=checkpoint.fingerprint(),
        tool_versions=_tool_versions(),
        files=describe_files(directory),
    )


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
