"""Scales of a checkpoint without a calibration: what the linear layers of the stock model see of some random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.bundle.scales import InputStatistics, Provenance, write_scales

NUM_TOKENS = 200


def observe_stock(model: Any, vocab_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows [T, in] that each linear layer of a stock model takes, by the name of its weight."""
    import torch
    from torch import nn

    rows: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: rows.__setitem__(f"{name}.weight", inputs[0][0].detach().numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (1, NUM_TOKENS))
    with torch.inference_mode():
        model(torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    return rows


def save_scales(path: Path, bundle: Bundle, rows: dict[str, np.ndarray], *, gram: bool = False) -> Path:
    """A scales file for the bundle's checkpoint, as ``calibrate`` would write it for these rows."""
    manifest = bundle.manifest
    provenance = Provenance(
        checkpoint_fingerprint=manifest.checkpoint_fingerprint,
        bundle_fingerprint=bundle.fingerprint,
        prompts_sha256="ab" * 32,
        num_prompts=1,
        loop="sliding",
        proposer="repeat",
        block_size=8,
        seed=0,
        mix=0.0,
        rows={"clean": NUM_TOKENS},
        tool_versions={},
    )
    inputs = [
        InputStatistics(
            tensors=(name,),
            num_rows=len(seen),
            amax=np.abs(seen).max(axis=0),
            high=np.abs(seen).max(axis=0),
            mean_abs=np.abs(seen).mean(axis=0),
        )
        for name, seen in rows.items()
    ]
    grams = {name: (lambda seen=seen: seen.T @ seen) for name, seen in rows.items()} if gram else None
    write_scales(path, provenance, inputs, grams)
    return path
