"""The checkpoint in PyTorch, as the reference that an exported bundle is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from cllm_export.bundle.manifest import TOKENIZER_NAME
from cllm_export.errors import CheckpointError, MissingExtraError
from cllm_export.exporter.checkpoint.adapter import open_source
from cllm_export.exporter.checkpoint.read import default_max_length
from cllm_export.exporter.checkpoint.tokenizer import convert_tokenizer
from cllm_export.exporter.graph.rotary import settle_rope


class Prediction(NamedTuple):
    """What the reference predicts at one position, given what stands before it."""

    token: int
    margin: float
    """Top logit minus that of the token that stands there: 0 where the two agree, tiny where they tie."""
    scale: float
    """Standard deviation of the logits there: what a margin is small or large against."""


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("peft", extra="train") from None
    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged


class Reference:
    """The stock transformers model of a checkpoint, in fp32 on the CPU; of an adapter, merged by PEFT into its base.

    Args:
        checkpoint_path: a checkpoint, or an adapter.
        max_length: see ``open_checkpoint``.
        base: of an adapter, if not the one that it names.
        num_layers: the first so many layers alone.

    Frequencies that transformers chooses anew for every length (longrope) are those of ``max_length``, as in a bundle.

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
            self._tokenizer = self._load_tokenizer(options)
        except MissingExtraError:
            raise
        except Exception as error:  # transformers raises many unrelated types for a bad checkpoint
            raise CheckpointError(f"transformers does not load {checkpoint_path}: {error}") from None
        settle_rope(self._model.model.rotary_emb, max_length or default_max_length(self.checkpoint.config))

    def _load_tokenizer(self, options: Mapping[str, bool]) -> PreTrainedTokenizerBase:
        path = self.checkpoint.text_path
        if not (path / TOKENIZER_NAME).is_file():
            return convert_tokenizer(path, self.checkpoint.tokenizer_config)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
        return tokenizer

    def encode(self, content: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a prompt, text or messages, as transformers' own tokenizer of the checkpoint gives them."""
        if isinstance(content, str):
            return list(self._tokenizer(content)["input_ids"])
        text = self._tokenizer.apply_chat_template(list(content), add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def predict(self, prompt: Sequence[int], new: Sequence[int]) -> list[Prediction]:
        """The greedy prediction at each of the new positions, given everything before it, in one forward."""
        ids = torch.tensor([[*prompt, *new][:-1]])
        logits = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        best, tokens = logits.max(dim=-1)
        margins = best - logits.gather(1, torch.tensor(list(new))[:, None])[:, 0]
        rows = zip(tokens.tolist(), margins.tolist(), logits.std(dim=-1).tolist(), strict=True)
        return [Prediction(*row) for row in rows]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> tuple[int, float]:
        """Greedy ``generate`` of transformers: number of new tokens, and seconds with prefill."""
        ids = torch.tensor([list(prompt)])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(eos_token_ids) or None, pad_token_id=0
        )
        started = perf_counter()
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return int(output.shape[1]) - len(prompt), perf_counter() - started
