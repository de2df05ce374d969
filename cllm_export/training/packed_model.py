"""A decoder that runs packed batches: what every process of a training run wraps, shards and calls."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_export.training.packing import Packed


class PackedModel(nn.Module):
    """A causal LM of transformers, giving logits only where a packed batch wants them.

    Args:
        decoder: the model; with LoRA the base model, whose layers carry the adapters.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, packed: Packed) -> Tensor:
        """Logits float32 [C + G, V] of ``packed.rows``."""
        hidden = self.decoder.model(
            input_ids=packed.input_ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = self.decoder.lm_head(hidden.flatten(0, 1)[packed.rows]).float()
        return logits
