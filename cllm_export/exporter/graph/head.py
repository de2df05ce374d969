"""What families do to their logits after the head."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


def as_returned(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """The head's output as the stock model returns it: it changes no argmax, but a distribution.

    Granite divides it (``logits_scaling``), Gemma 2 bends it (``final_logit_softcapping``).
    """
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
