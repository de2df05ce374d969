"""The model families that the graph can express, and the reasons why others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm_export.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


FAMILIES = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "starcoder2",
    "stablelm",
)
"""Model types that have a parity test in the exporter."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
"""Rope types whose table depends only on the position, or on the position and the length the bundle is built for."""


def truncated_config(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The config, reduced to its first ``num_layers`` layers."""
    short, total = copy.deepcopy(config), int(config.num_hidden_layers)
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == total:
            setattr(short, name, value[:num_layers])
    short.num_hidden_layers = num_layers
    return short


def layer_types_of(config: PretrainedConfig) -> list[str] | None:
    """The type of each layer; None if the config class has no layer types, whatever ``config.json`` says."""
    return list(config.layer_types) if hasattr(type(config), "layer_types") else None


def window_within(config: PretrainedConfig, max_length: int) -> int | None:
    """The sliding window in tokens; None if no layer has one or if ``max_length`` tokens fit in it."""
    layer_types = layer_types_of(config)
    slides = hasattr(type(config), "sliding_window") if layer_types is None else "sliding_attention" in layer_types
    window: int | None = config.sliding_window if slides else None
    return window if window is not None and window < max_length else None


def refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    family = raw.get("model_type")
    for reason, applies in _REFUSALS.items():
        if applies(raw):
            raise UnsupportedError(f"{path} (model type {family!r}) uses {reason}, which is not supported yet")
    if _has_experts(raw):
        raise UnsupportedError(
            f"{path} (model type {family!r}) is a mixture of experts, which is not supported: its graph would have to "
            "compute and read every expert, masked, in every forward, and lose what the experts are for; "
            "choose a dense model"
        )
    if family == "gemma3":
        raise UnsupportedError(
            f"{path} has model type 'gemma3', which holds a vision encoder too; supported is its text model alone "
            "(model type 'gemma3_text'): save that with Gemma3ForCausalLM"
        )
    if family not in FAMILIES:
        raise UnsupportedError(f"{path} has model type {family!r}; supported are {', '.join(FAMILIES)}")


EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

EXPERT_FAMILIES = ("mixtral", "dbrx", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "jamba")
"""Model types that are mixtures of experts although their name does not contain ``moe``."""


def _has_experts(raw: Mapping[str, Any]) -> bool:
    family = str(raw.get("model_type"))
    return "moe" in family or family in EXPERT_FAMILIES or any(raw.get(key) for key in EXPERT_KEYS)


_REFUSALS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "quantised weights (quantization_config)": lambda raw: bool(raw.get("quantization_config")),
    "weights of another name (transformers_weights)": lambda raw: bool(raw.get("transformers_weights")),
    "an encoder (is_encoder_decoder)": lambda raw: bool(raw.get("is_encoder_decoder")),
    "bidirectional attention (use_bidirectional_attention)": lambda raw: bool(raw.get("use_bidirectional_attention")),
}


def refuse_layers(config: PretrainedConfig, path: Path) -> None:
    if unknown := sorted(set(layer_types_of(config) or ()) - LAYER_TYPES):
        raise UnsupportedError(
            f"{path} has layers of type {unknown[0]!r}; supported are {', '.join(sorted(LAYER_TYPES))}"
        )


def refuse_rope(config: PretrainedConfig, path: Path, max_length: int | None) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for name, part in parameters.items() if name in LAYER_TYPES and part]
    rope_types = {part.get("rope_type", "default") for part in nested or [parameters]}
    if unknown := sorted(rope_types - set(ROPE_TYPES)):
        raise UnsupportedError(f"{path} has rope type {unknown[0]!r}; supported are {', '.join(ROPE_TYPES)}")
    limit = int(config.max_position_embeddings)
    if "dynamic" in rope_types and (max_length or 0) > limit:
        raise UnsupportedError(
            f"{path} has rope type 'dynamic', which beyond {limit} positions has other frequencies for every length, "
            f"and a graph has one table: choose max_length={limit} or less, where it scales nothing (it is "
            f"{max_length})"
        )
