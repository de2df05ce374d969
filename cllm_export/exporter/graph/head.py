"""The operations that some model families apply to their logits after the head."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


def as_returned(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """The logits as the stock model returns them. The argmax stays the same, but the distribution changes.

    Granite divides the logits (``logits_scaling``); Gemma 2 passes them through tanh (``final_logit_softcapping``).
    """
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
