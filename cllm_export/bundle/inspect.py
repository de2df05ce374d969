"""Describe a bundle's contents and the memory it will need, from its manifest only."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cllm_export.bundle.manifest import PARITY_NAME, Bundle


def describe(bundle: Bundle) -> dict[str, Any]:
    """Contents, memory and proof of a bundle, JSON-ready.

    Memory counts the engine's own data: weights, and the KV cache of every slot. Activations need more memory; for a
    block of a few dozen tokens they are small compared with both.
    """
    manifest = bundle.manifest
    geometry = manifest.geometry
    weights = bundle.weight_bytes
    per_token = geometry.kv_bytes_per_token(manifest.precision)
    cache = per_token * geometry.cache_length * manifest.batch_size
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
        "memory": {
            "weights": weights,
            "kv_per_token": per_token,
            "kv_cache": cache,
            "total": weights + cache,
        },
        "checkpoint_fingerprint": manifest.checkpoint_fingerprint,
        "tool_versions": manifest.tool_versions,
        "parity": _parity(bundle),
    }


def _parity(bundle: Bundle) -> str:
    """Whether ``parity.json`` proves this exact bundle."""
    try:
        report = json.loads((bundle.path / PARITY_NAME).read_text(encoding="utf-8"))
        fingerprint, passed = report["bundle_fingerprint"], report["passed"]
        compared = report["conditions"]["compared_with_checkpoint"]
    except FileNotFoundError:
        return "not verified: run cllm-export verify"
    except (OSError, ValueError, KeyError, TypeError):
        return "parity.json is damaged: run cllm-export verify again"
    if fingerprint != bundle.fingerprint:
        return "verified before it was rebuilt: run cllm-export verify again"
    proved = "verified" if compared else "verified, though not against its checkpoint"
    return proved if passed else "verification failed, see parity.json"
