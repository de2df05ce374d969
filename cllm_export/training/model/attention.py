"""Attention for training on a CPU: PyTorch's own, always in float32.

On a CPU, bf16 doubles the speed of matrix products. But the backward pass of PyTorch's attention takes 3.5 times as
long in bf16 as in float32, which would be half of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from transformers import AttentionInterface

CPU_ATTENTION = "cllm_export_cpu"


def register_cpu_attention() -> None:
    """Register ``CPU_ATTENTION`` as an attention implementation that a model's config may name."""
    AttentionInterface.register(CPU_ATTENTION, _attention)


def _attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The registered attention: query [B, H, n, D], key and value [B, K, S, D], bool mask [B, 1, n, S]."""
    assert mask is not None, "packed batches and held-out decoding say what each row sees"
    dtype = query.dtype
    groups = query.shape[1] // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).contiguous().to(dtype), None
