"""Makes the config of a checkpoint from the metadata of a GGUF file.

transformers has a table of the fields for each architecture. It leaves out what changes the model: rope scaling,
softcaps, biases, and the size of a head in some families. What it leaves out is added here, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.gguf.architectures import HEAD
from cllm_export.exporter.gguf.header import GgufFile
from cllm_export.exporter.gguf.rope import rope_parameters
from cllm_export.exporter.gguf.tokenizer import ends_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MISTRAL = "mistral"
"""Name of a model that transformers takes for its family, though its architecture is ``llama``."""
WINDOWED = ("gemma2", "gemma3", "phi3", "starcoder2")
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose attention is scaled by another size than that of a head, as llama.cpp knows."""


def config_of(file: GgufFile) -> PretrainedConfig:
    """The config of the model in a GGUF file, as transformers makes it, with what its tables leave out.

    Raises:
        CheckpointError: transformers refuses the values.
        UnsupportedError: the family has no place for a value.
    """
    from transformers import AutoConfig

    values = _by_table(file)
    model_type = values.pop("model_type")
    values |= _heads(file) | _attention(file) | _ends(file)
    values.pop("rope_theta", None)
    values["rope_parameters"] = rope_parameters(file)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers raises many unrelated types for a bad config
        raise CheckpointError(f"{file.path} has a config that transformers refuses: {error}") from None
    return config


def _by_table(file: GgufFile) -> dict[str, Any]:
    """What the tables of transformers give."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    name, values = file.architecture, dict[str, Any]()
    for prefix, table in (("general", GGUF_CONFIG_MAPPING["general"]), (name, GGUF_CONFIG_MAPPING[name])):
        values |= _renamed(file, prefix, table)
    values |= _renamed(file, "tokenizer", GGUF_CONFIG_MAPPING["tokenizer"])
    if name == "llama" and values.get("_model_name_or_path") == MISTRAL:
        values |= {"model_type": MISTRAL, "sliding_window": None}
    elif name == "gemma3":
        values["model_type"] = "gemma3_text"
    values.setdefault("vocab_size", len(file.metadata["tokenizer.ggml.tokens"]))
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    return values | {"tie_word_embeddings": HEAD not in file.tensors}


def _renamed(file: GgufFile, prefix: str, table: Mapping[str, str | None]) -> dict[str, Any]:
    found = {field: file.metadata.get(f"{prefix}.{key}") for key, field in table.items() if field}
    return {field: value for field, value in found.items() if value is not None}


def _heads(file: GgufFile) -> dict[str, Any]:
    """The size of a head, where it is not the width over the number of heads."""
    width, count = file.get("embedding_length"), file.get("attention.head_count")
    size = file.get("attention.key_length", width // count)
    if file.architecture == "llama":
        size = file.get("attention.key_length", file.get("rope.dimension_count", size))
    if file.get("attention.value_length", size) != size:
        raise UnsupportedError(
            f"{file.path} has keys of {size} values a head and values of "
            f"{file.get('attention.value_length')}, and in the family both are alike; choose another model"
        )
    if file.architecture in ("llama", "qwen3", "gemma2", "gemma3"):
        return {"head_dim": size}
    if size * count != width:
        raise UnsupportedError(
            f"{file.path} has {count} heads of {size} values, and {file.architecture} has its width of {width} for "
            "them; choose another model"
        )
    return {}


def _attention(file: GgufFile) -> dict[str, Any]:
    """Biases, softcaps, windows, lengths and scales."""
    name, values = file.architecture, dict[str, Any]()
    if name in ("llama", "qwen3", "gemma2", "gemma3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if name == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if name == "phi3" and (original := file.get("rope.scaling.original_context_length")):
        values["original_max_position_embeddings"] = original
    if name == "stablelm":
        values["use_qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
        values["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in file.tensors
    if name == "starcoder2":
        values["use_bias"] = "blk.0.attn_q.bias" in file.tensors
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in _LARGEST_GEMMA and file.get(field) is not None:
            values[field] = file.get(field)
    if name in _LARGEST_GEMMA:
        is_largest = file.get("block_count") == _LARGEST_GEMMA[name]
        head = file.get("embedding_length") // file.get("attention.head_count")
        values["query_pre_attn_scalar"] = head if is_largest else file.get("attention.key_length", head)
    return values | _window(file)


def _window(file: GgufFile) -> dict[str, Any]:
    window = file.get("attention.sliding_window", 0)
    if file.architecture in WINDOWED:
        pattern = file.get("attention.sliding_window_pattern")
        values = {"sliding_window": window} if window else {}
        return values | ({"layer_types": _layer_types(file, pattern)} if pattern is not None else {})
    if 0 < window < file.get("context_length"):
        raise UnsupportedError(
            f"{file.path} has a sliding window of {window} tokens, and its family {file.architecture!r} has none here: "
            "build the Hugging Face checkpoint of the model"
        )
    return {}


def _layer_types(file: GgufFile, pattern: int | list[bool]) -> list[str]:
    """The type of each layer: every p-th is full, or as a list says which ones slide."""
    layers = file.get("block_count")
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % max(pattern, 1) != 0 for layer in range(layers)]
    if len(slides) != layers:
        raise CheckpointError(f"{file.path} is damaged: it says of {len(slides)} of {layers} layers whether they slide")
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _ends(file: GgufFile) -> dict[str, Any]:
    """The tokens that end a text: one, or a list if there are several."""
    ids = ends_of(file)
    return {"eos_token_id": ids[0] if len(ids) == 1 else ids}
