"""A decoder that runs packed batches. Every process of a training run wraps, shards and calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cllm_export.exporter.graph.head import as_returned
from cllm_export.training.model.packing import Packed


class PackedModel(nn.Module):
    """A causal LM of transformers that returns logits only for the rows that a packed batch asks for.

    Sharded parameters are gathered only around a call of this module, so held-out decoding calls it as well. It has the
    interface of the decoder for ``TorchEngine``, and then runs the decoder without autocast.

    Args:
        decoder: the model; with LoRA the base model, whose layers contain the adapters.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self._no_split_modules = decoder._no_split_modules
        """Classes that accelerate uses as the units of sharding: the decoder's layers."""

    @property
    def config(self) -> PretrainedConfig:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.decoder.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.decoder.dtype
        return dtype

    def forward(self, packed: Packed | None = None, **decoding: Any) -> Any:
        """Logits float32 [C + G, V] of ``packed.rows``. Without ``packed``, the decoder's output for ``decoding``."""
        if packed is None:
            with torch.autocast(self.device.type, enabled=False):
                return self.decoder(**decoding)
        return self._logits(packed)

    def _logits(self, packed: Packed) -> Tensor:
        hidden = self.decoder.model(
            input_ids=packed.input_ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = self.decoder.lm_head(hidden.flatten(0, 1)[packed.rows]).float()
        return as_returned(logits, self.config)
