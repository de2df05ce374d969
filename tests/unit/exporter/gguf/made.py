"""Tiny GGUF files of the families, made from tiny checkpoints as llama.cpp's converter makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFEndian, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from cllm_export.exporter.gguf.rope import llama3_factors

Kind = GGMLQuantizationType
KindOf = Callable[[str], Kind]
ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
"""Model type -> the architecture in GGUF, if it has another name."""
CONTROL, NORMAL = 3, 1


def plain(name: str) -> Kind:
    """Every tensor as fp32."""
    return Kind.F32


def write_gguf(
    path: Path,
    checkpoint: Path,
    *,
    kind_of: KindOf = plain,
    drop: Sequence[str] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    architecture: str | None = None,
    **metadata: Any,
) -> Path:
    """Convert a checkpoint of fp32.

    Args:
        drop: names of metadata fields and of tensors that are left out.
        tensors: more tensors of the file.
        metadata: more fields, or other values of them. A double underscore stands for a dot.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    name = architecture or ARCHITECTURES.get(config["model_type"], config["model_type"])
    fields = _sizes(config, name) | _rope(config, name) | _tokenizer(checkpoint, config)
    fields |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = GGUFWriter(path, name, endianess=endian)
    for key, value in fields.items():
        if key not in drop:
            _add(writer, key, value)
    for stored, values in (_tensors(checkpoint, config, name) | dict(tensors or {})).items():
        if stored not in drop:
            kind = kind_of(stored) if values.ndim == 2 else Kind.F32
            writer.add_tensor(stored, stored_values(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_values(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Values in a type. Where ``gguf`` cannot quantise, they are blocks of random bytes with finite scales."""
    try:
        return quantize(values, kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        shape = (*values.shape[:-1], values.shape[-1] // block * size)
        return np.random.default_rng(int(kind)).integers(0, 0x3C, shape, np.uint8)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    eps = next(key for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon") if key in config)
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        f"attention.layer_norm_{'rms_' if eps == 'rms_norm_eps' else ''}epsilon": config[eps],
    }
    if name in ("qwen3", "gemma2", "gemma3"):
        fields |= {"attention.key_length": head, "attention.value_length": head}
    if name in ("gemma2", "gemma3", "phi3") and config.get("sliding_window"):
        fields["attention.sliding_window"] = config["sliding_window"]
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            fields[cap] = config[cap]
    if name == "gemma3":
        fields["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    fields["rope.dimension_count"] = int(head * (config["rope_parameters"].get("partial_rotary_factor") or 1.0))
    return {f"{name}.{key}": value for key, value in fields.items()}


def _rope(config: dict[str, Any], name: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{name}.{key}": value for key, value in fields.items()}


def _tokenizer(checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    raw = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    model, special = raw["model"], {token["content"] for token in raw["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "padding_token_id": config["pad_token_id"],
        "add_bos_token": True,
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    template = checkpoint / "chat_template.jinja"
    return found | ({"tokenizer.chat_template": template.read_text()} if template.exists() else {})


def _tensors(checkpoint: Path, config: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    table = get_tensor_name_map(architecture, config["num_hidden_layers"])
    found = {}
    for key, values in load_file(checkpoint / "model.safetensors").items():
        stem, _, suffix = key.rpartition(".")
        stored = f"{table.get_name(stem)}.{suffix}"
        changed = permuted(values, config[HEADS[stored.split(".")[-2]]]) if _is_permuted(name, stored) else values
        found[stored] = changed + 1 if name in ("gemma2", "gemma3") and stored.endswith("norm.weight") else changed
    return found | _rope_tensors(config, name)


HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def _is_permuted(name: str, stored: str) -> bool:
    return name == "llama" and stored.split(".")[-2] in HEADS


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the halves of each head alternate."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def _rope_tensors(config: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        keys = ("factor", "high_freq_factor", "original_max_position_embeddings")
        factors = llama3_factors(rope["rope_theta"], config["head_dim"], **{key: rope[key] for key in keys})
        return {"rope_freqs.weight": factors.astype(np.float32)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": np.float32(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    return {}
