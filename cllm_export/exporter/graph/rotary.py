"""Rotary embeddings as tables: cos and sin at every position, computed by the stock module.

Most rope types depend only on the position. Longrope and dynamic scaling also depend on the length of their input. A
graph has one table, so the frequencies of such a module are fixed for the length that a bundle is built for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cllm_export.errors import UnsupportedError

Tables = Mapping[str | None, tuple[Tensor, Tensor]]
"""Layer type (None if all layers share a table) -> cos and sin [C, R/2] in fp32, for R rotated columns per head."""


def settle_rope(rotary: nn.Module, max_length: int) -> None:
    """Fix the frequencies of a stock rotary embedding to those it uses for an input of ``max_length`` tokens."""
    positions = torch.arange(max_length)[None]
    for layer_type in _layer_types(rotary):
        _cos_sin(rotary, positions, layer_type)
    rope_type: Any = rotary.rope_type
    settled = "default"  # the only type whose frequencies no forward changes
    rotary.rope_type = dict.fromkeys(rope_type, settled) if isinstance(rope_type, dict) else settled  # type: ignore[assignment]


def rotary_tables(rotary_type: type[nn.Module], config: PretrainedConfig, *, max_length: int, length: int) -> Tables:
    """The tables of positions 0..length - 1, with the frequencies for inputs of ``max_length`` tokens.

    Raises:
        UnsupportedError: the rotation does not have the half-split form.
    """
    rotary = rotary_type(config)
    settle_rope(rotary, max_length)
    positions = torch.arange(length)[None]
    return {
        layer_type: _halves(rotary, *_cos_sin(rotary, positions, layer_type)) for layer_type in _layer_types(rotary)
    }


def _layer_types(rotary: nn.Module) -> tuple[str | None, ...]:
    return tuple(rotary.rope_type) if isinstance(rotary.rope_type, dict) else (None,)


@torch.no_grad()
def _cos_sin(rotary: nn.Module, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    device = next(rotary.buffers()).device
    arguments = () if layer_type is None else (layer_type,)
    cos, sin = rotary(torch.zeros(1, device=device), positions.to(device), *arguments)
    return cos[0], sin[0]


def _halves(rotary: nn.Module, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1] // 2
    for table in (cos, sin):
        if not torch.equal(table[:, :half], table[:, half:]):
            raise UnsupportedError(
                f"{type(rotary).__name__} interleaves its rotation; only the half-split form is known"
            )
    return cos[:, :half].contiguous(), sin[:, :half].contiguous()
