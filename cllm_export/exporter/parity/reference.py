"""The checkpoint in PyTorch: the reference for comparing an exported bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cllm_export.errors import CheckpointError, MissingExtraError, OutdatedPackageError
from cllm_export.exporter.checkpoint.adapter import open_source
from cllm_export.exporter.checkpoint.read import default_max_length
from cllm_export.exporter.graph.rotary import settle_rope
from cllm_export.exporter.parity.tokenization import ReferenceTokenizer
from cllm_export.extras import missing_extra, require_floors


class Prediction(NamedTuple):
    """The reference's prediction at one position, given the tokens before it."""

    token: int
    margin: float
    """Top logit minus the logit of the actual token: 0 if they are the same token, tiny if they tie."""
    scale: float
    """Standard deviation of the logits at this position, to which a margin is compared."""


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError:
        raise missing_extra("peft", extra="train") from None
    require_floors("peft")
    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged


class Reference:
    """The stock transformers model of a checkpoint, in fp32 on the CPU. PEFT merges an adapter into its base.

    Args:
        checkpoint_path: a checkpoint, or an adapter.
        max_length: see ``open_checkpoint``.
        base: the base of an adapter, if it is not the one that the adapter names.
        num_layers: use only this many layers, from the first.

    Some rotary frequencies depend on the input length in transformers (longrope). They are fixed to those of
    ``max_length``, as in a bundle.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unsupported.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        *,
        max_length: int | None = None,
        base: Path | None = None,
        num_layers: int | None = None,
    ) -> None:
        self.checkpoint, adapter = open_source(Path(checkpoint_path), base, max_length=max_length)
        if num_layers is not None:
            self.checkpoint = self.checkpoint.with_layers(num_layers)
        transformers_logging.disable_progress_bar()
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.checkpoint.path,
                config=self.checkpoint.config,
                dtype=torch.float32,
                attn_implementation="eager",
                **options,
            )
            self._model = (_merged(model, adapter.path) if adapter else model).eval()
        except (MissingExtraError, OutdatedPackageError):
            raise
        except Exception as error:  # transformers raises many unrelated types for a bad checkpoint
            raise CheckpointError(f"transformers does not load {checkpoint_path}: {error}") from None
        settle_rope(self._model.model.rotary_emb, max_length or default_max_length(self.checkpoint.config))
        self.tokenizer = ReferenceTokenizer(self.checkpoint.text_path, self.checkpoint.tokenizer_config)

    @torch.inference_mode()
    def predict(self, prompt: Sequence[int], new: Sequence[int]) -> list[Prediction]:
        """The greedy prediction at each new position, given all tokens before it. Uses one forward."""
        ids = torch.tensor([[*prompt, *new][:-1]])
        logits = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        best, tokens = logits.max(dim=-1)
        margins = best - logits.gather(1, torch.tensor(list(new))[:, None])[:, 0]
        rows = zip(tokens.tolist(), margins.tolist(), logits.std(dim=-1).tolist(), strict=True)
        return [Prediction(*row) for row in rows]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> tuple[int, float]:
        """Run greedy ``generate`` of transformers. Returns the number of new tokens, and seconds including prefill."""
        ids = torch.tensor([list(prompt)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(eos_token_ids) or None, pad_token_id=0
        )
        started = perf_counter()
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return int(output.shape[1]) - len(prompt), perf_counter() - started
