"""Describe a bundle's contents and the memory it will need, from its manifest only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cllm_export.bundle.manifest import LOOKAHEAD_GRAPH, PARITY_NAME, Bundle
from cllm_export.bundle.memory import PREFIX_CACHE_BYTES, Load, running_figures

LIBRARIES = {
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "driver": "driver",
}
"""Names of what a certificate has the version of."""


def describe(bundle: Bundle) -> dict[str, Any]:
    """Contents, memory and proof of a bundle, JSON-ready.

    Memory has every part of a running engine, and their total: see ``bundle/memory.py``.
    """
    manifest = bundle.manifest
    geometry = manifest.geometry
    return {
        "path": str(bundle.path),
        "fingerprint": bundle.fingerprint,
        "family": manifest.family,
        "precision": manifest.precision,
        "quantization": asdict(manifest.quantization) if manifest.quantization else None,
        "block_size": manifest.block_size,
        "max_length": manifest.max_length,
        "batch_size": manifest.batch_size,
        "eos_token_ids": list(manifest.eos_token_ids),
        "trained_with": vars(manifest.trained_with) if manifest.trained_with else None,
        "geometry": vars(geometry),
        "graphs": {
            name: {"file": entry.file, "fixed_shapes": vars(entry.fixed_shapes) if entry.fixed_shapes else None}
            for name, entry in manifest.graphs.items()
        },
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "linked_files": {file.path: file.size for file in manifest.linked_files.values()},
        "memory": _memory(bundle),
        "checkpoint_fingerprint": manifest.checkpoint_fingerprint,
        "tool_versions": manifest.tool_versions,
        "parity": _parity(bundle),
    }


def _memory(bundle: Bundle) -> dict[str, int]:
    """Bytes of each part. The lookahead graph has a session of its own, which packs the weights a second time."""
    weights, cache, activations = (figure.bytes for figure in running_figures(bundle, Load.of(bundle)))
    lookahead = {"weights_packed_again_for_lookahead": weights} if LOOKAHEAD_GRAPH in bundle.manifest.graphs else {}
    return {
        "weights": weights,
        "kv_per_token": bundle.manifest.geometry.kv_bytes_per_token(bundle.manifest.precision),
        "kv_cache": cache,
        "activations": activations,
        "prefix_cache": PREFIX_CACHE_BYTES,
        **lookahead,
        "total": weights + cache + activations + PREFIX_CACHE_BYTES + sum(lookahead.values()),
    }


def _parity(bundle: Bundle) -> str:
    """Whether ``parity.json`` proves this exact bundle."""
    try:
        report = json.loads((bundle.path / PARITY_NAME).read_text(encoding="utf-8"))
        fingerprint, passed = report["bundle_fingerprint"], report["passed"]
        compared = report["conditions"]["compared_with_checkpoint"]
        certified = _certified(report)
    except FileNotFoundError:
        return "not verified: run cllm-export verify"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "parity.json is damaged: run cllm-export verify again"
    if fingerprint != bundle.fingerprint:
        return "verified before it was rebuilt: run cllm-export verify again"
    proved = "verified" if compared else "verified, though not against its checkpoint"
    return f"{proved if passed else 'verification failed, see parity.json'}; {certified}"


def _certified(report: Mapping[str, Any]) -> str:
    """What a certificate is about: provider, device, precision, versions, threads; and which sizes are exact there."""
    conditions, sizes = report["conditions"], report["exact_sizes"]
    versions = [f"{LIBRARIES[name]} {conditions[name]}" for name in LIBRARIES if name in conditions]
    threads = [f"{conditions['threads']} thread{'s' * (conditions['threads'] != 1)}"] if "threads" in conditions else []
    precision = conditions["quantization"] or conditions["precision"]
    text = f"provider {conditions['provider']} on {conditions['device'] or 'an unknown device'}, " + ", ".join(
        [precision, *versions, *threads]
    )
    if sizes is None:
        return text
    exact = f"bit-equal to n = 1: {', '.join(map(str, sizes['equal'])) or 'no other n'}"
    different = f"; not bit-equal: {', '.join(map(str, sizes['different']))}" if sizes["different"] else ""
    return f"{text}; {exact}{different}"
