"""The checkpoint in PyTorch, as the reference that an exported bundle is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from cllm_export.exporter.checkpoint import open_checkpoint


class ReferenceStep(NamedTuple):
    """What the reference predicts at one position."""

    token: int
    margin: float
    """Top logit minus the second: how near the prediction is to a tie."""


class Reference:
    """The stock transformers model of a checkpoint, in fp32 on the CPU.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unsupported.
    """

    def __init__(self, checkpoint_path: str | Path, *, max_length: int | None = None) -> None:
        self.checkpoint = open_checkpoint(checkpoint_path, max_length=max_length)
        transformers_logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def predict(self, prompt: Sequence[int], new: Sequence[int]) -> list[ReferenceStep]:
        """The greedy prediction at each of the new positions, given everything before it, in one forward."""
        ids = torch.tensor([[*prompt, *new][:-1]])
        logits = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        top = logits.topk(2, dim=-1)
        margins = top.values[:, 0] - top.values[:, 1]
        return [
            ReferenceStep(int(token), float(margin)) for token, margin in zip(top.indices[:, 0], margins, strict=True)
        ]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> tuple[int, float]:
        """Greedy ``generate`` of transformers: number of new tokens, and seconds with prefill."""
        ids = torch.tensor([list(prompt)])
        started = perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(eos_token_ids) or None,
        )
        return int(output.shape[1]) - len(prompt), perf_counter() - started
