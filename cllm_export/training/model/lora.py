"""LoRA: tuning adds adapters to every projection of the decoder; saving merges them into plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from cllm_export.training.model.options import LoraOptions

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj"),
)
"""Names of the projections in all families. Some families pack query, key and value, or gate and up, into one."""
ADAPTER = "default"


def add_lora(decoder: PreTrainedModel, options: LoraOptions) -> None:
    """Add adapters to the decoder's projections, in place, and freeze everything else."""
    alpha: Any = options.settled_alpha  # peft declares an int but accepts any number
    config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=list(PROJECTIONS), lora_dropout=0.0)
    inject_adapter_in_model(config, decoder, adapter_name=ADAPTER)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(weights: Mapping[str, Tensor], options: LoraOptions) -> dict[str, Tensor]:
    """Plain weights from those of a decoder with adapters: W + alpha / rank * B A, computed in float32.

    It takes a state dict instead of the model, so that it works for sharded models as well.
    """
    merged: dict[str, Tensor] = {}
    scale = options.settled_alpha / options.rank
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = tensor
            continue
        module, part = name.split(".base_layer.")
        if part == "weight":
            down, up = (weights[f"{module}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            merged[f"{module}.weight"] = torch.addmm(tensor.float(), up, down, alpha=scale).to(tensor.dtype)
        else:
            merged[f"{module}.{part}"] = tensor
    return merged
