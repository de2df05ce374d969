"""The losses of consistency tuning, as pure functions of logits.

V is the vocabulary size. One consistency loss serves global, local and packed. They differ only in which states are in
the batch and which logits are the teacher's (``packing.py``).
Sources: CLLM (arXiv 2403.00835), Jacobi Forcing (arXiv 2512.14681).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

SMALLEST_WEIGHT = 1e-6
"""Lower bound of the sum of weights. Where all weights are 0, the loss is then 0 instead of 0 / 0."""


def autoregressive_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of the next token, a scalar.

    Args:
        logits: float32 [C, V], of the clean rows.
        targets: int64 [C].
    """
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def consistency_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Forward Kullback-Leibler divergence from the teacher's distribution to the student's, a scalar.

    It is the weighted mean over the rows. Where all weights are 0, loss and gradient are 0. The teacher gets no
    gradient.

    Args:
        student: float32 [G, V], at noisy states.
        teacher: float32 [G, V], at the fixed point (global) or at the next state (local).
        weight: float32 [G].
    """
    target = F.log_softmax(teacher.detach(), dim=-1)
    divergence = F.kl_div(F.log_softmax(student, dim=-1), target, reduction="none", log_target=True).sum(-1)
    return (divergence * weight).sum() / weight.sum().clamp(min=SMALLEST_WEIGHT)
