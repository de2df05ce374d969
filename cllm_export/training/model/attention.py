"""Attention for training on a CPU: PyTorch's own, in float32 whatever the rest runs in.

bf16 doubles the speed of matrix products there, but PyTorch's bf16 attention takes 3.5 times as long backward as its
float32 one, and half of a step would be spent in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from transformers import AttentionInterface

CPU_ATTENTION = "cllm_export_cpu"


def register_cpu_attention() -> None:
    """Make ``CPU_ATTENTION`` a name that a model's config may give as its attention."""
    AttentionInterface.register(CPU_ATTENTION, _attention)


def _attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of the registry: query [B, H, n, D], key and value [B, K, S, D], bool mask [B, 1, n, S]."""
    assert mask is not None, "packed batches and held-out decoding say what each row sees"
    dtype = query.dtype
    groups = query.shape[1] // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).contiguous().to(dtype), None
