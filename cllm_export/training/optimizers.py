"""The optimisers of tuning and their learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from cllm_export.training import OptimizerName

WARMUP_STEPS = 20


def make_optimizers(
    model: nn.Module, name: OptimizerName, *, learning_rate: float, matrix_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything (``adamw``), or Muon for the decoder's matrices and AdamW for the rest (``muon``).

    The rest is embeddings, head and norms. Muon orthogonalises the update of each matrix and needs the whole matrix, so
    it does not work with sharded parameters. It trains a small model from scratch in about half of AdamW's steps.
    """
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    is_matrix = {key: name == "muon" and value.ndim == 2 and not _is_table(key) for key, value in trained}
    rest = [parameter for key, parameter in trained if not is_matrix[key]]
    matrices = [parameter for key, parameter in trained if is_matrix[key]]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay))
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _is_table(key: str) -> bool:
    return "embed_tokens" in key or "lm_head" in key


def set_learning_rate(optimizers: list[torch.optim.Optimizer], *, step: int, progress: float, decay: float) -> float:
    """Set the learning rate for the next step, and return its share of the peak.

    The rate rises linearly, stays constant, then falls linearly to zero over the last ``decay`` of the run.

    Args:
        step: optimiser steps done.
        progress: share of the run that is done, 0 to 1.
        decay: share of the run, 0 to 1.
    """
    falling = (1.0 - progress) / decay if decay else 1.0
    share = min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, falling)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
    return share
