"""Writes the files of a bundle, except its weights."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from cllm_export.bundle.linked_weights import LinkedFile
from cllm_export.bundle.manifest import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    GREEDY_GRAPH,
    LOOKAHEAD_GRAPH,
    MORE_CHAT_TEMPLATES_NAME,
    TENSORRT_GRAPH,
    TOKENIZER_NAME,
    FileEntry,
    GraphEntry,
    Manifest,
)
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.exporter.graph.model import DecoderGraph
from cllm_export.exporter.graph.passes import pin_shapes, state_contract
from cllm_export.exporter.lint.rules import NOT_PARSED, require_clean
from cllm_export.exporter.quantize.schemes import SCHEMES
from cllm_export.exporter.settle import Settings
from cllm_export.exporter.stages import Stages
from cllm_export.exporter.weights.weights import (
    Layout,
)
from cllm_export.runtime.decoding.text import DEFAULT, templates_by_name

log = logging.getLogger(__name__)

GRAPH_FILES = {GREEDY_GRAPH: "model.onnx", LOOKAHEAD_GRAPH: "lookahead.onnx", TENSORRT_GRAPH: "tensorrt.onnx"}

TOOLS = ("cllm-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors")


def finish_graph(graph: DecoderGraph, settings: Settings, stages: Stages) -> None:
    """Give the graph the names and shapes of the contract, then lint it."""
    with stages.stage("lint"):
        if settings.fixed:
            pin_shapes(graph, settings.geometry, settings.fixed)
        state_contract(graph, settings.geometry, settings.fixed)
        # The lint needs no weights, so it runs before any are written. Which graph is parsed is not known yet.
        lint_graph(graph, ir.serde.serialize_model(graph.model), is_parsed=False)


def lint_graph(graph: DecoderGraph, proto: onnx.ModelProto, *, is_parsed: bool) -> None:
    """Check the graph against TensorRT's rules. In a graph not made for TensorRT, skip its quantising operators.

    ``is_parsed`` is whether TensorRT parses this graph of the bundle. Any other may break a few rules.
    """
    made = graph.quantization
    for_others = made is not None and "tensorrt" not in made.engines
    require_clean(
        proto,
        unjudged=SCHEMES[made.scheme].unjudged if made and for_others else (),
        waived=() if is_parsed and not for_others else NOT_PARSED,
    )


def write_graph(graph: DecoderGraph, name: str, directory: Path, *, is_parsed: bool) -> None:
    """Lint a finished graph once more, and write it. See ``lint_graph`` for ``is_parsed``."""
    graph.model.producer_name, graph.model.graph.name = "cllm-export", name
    proto = ir.serde.serialize_model(graph.model)
    lint_graph(graph, proto, is_parsed=is_parsed)
    onnx.save(proto, directory / GRAPH_FILES[name])
    log.info("%s: %d nodes", GRAPH_FILES[name], len(proto.graph.node))


def copy_text_files(checkpoint: Checkpoint, directory: Path) -> None:
    (directory / TOKENIZER_NAME).write_bytes(checkpoint.tokenizer_json)
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(checkpoint.path / GENERATION_CONFIG_NAME, directory / GENERATION_CONFIG_NAME)
    templates = templates_by_name(checkpoint.chat_template)
    if (default := templates.pop(DEFAULT, None)) is not None:
        (directory / CHAT_TEMPLATE_NAME).write_text(default, encoding="utf-8")
    if templates:
        text = json.dumps(templates, indent=2, sort_keys=True)
        (directory / MORE_CHAT_TEMPLATES_NAME).write_text(text + "\n", encoding="utf-8")


def make_manifest(
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
