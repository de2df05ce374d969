"""Tiny random checkpoints of every supported family, made in about a tenth of a second each.

Weights are large enough that the best two logits lie well apart and outputs vary, and norms and biases are random
too: a graph that forgot one of them gives other tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
MAX_POSITIONS = 256
WINDOW = 24
"""Of the layers that slide: far shorter than prompts and KV lengths, and no multiple of a step of either."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.5, 3.5, 4.5],
    "original_max_position_embeddings": 64,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
LAYERED_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one tiny checkpoint is made of. ``config`` holds any other key of the family's config, sizes included."""

    family: str = "llama"
    num_layers: int = 2
    tied: bool = True
    num_kv_heads: int = 2
    head_dim: int | None = None
    rope: Mapping[str, Any] | None = None
    dtype: str = "float32"
    sharded: bool = False
    chat_template: str | None = None
    eos: int | Sequence[int] = EOS
    cllm: Mapping[str, Any] | None = None
    max_positions: int = MAX_POSITIONS
    seed: int = 0
    embedding_scale: float = 0.3
    """Standard deviation of the embeddings: small where a family multiplies them, or no layer would change a token."""
    weight_scale: float = 0.3
    """Standard deviation of all other weights."""
    config: Mapping[str, Any] = field(default_factory=dict)


SLOW_VARIANTS = frozenset(
    (
        "mistral-window",
        "qwen2-window",
        "llama-dynamic",
        "gemma",
        "ministral",
        "granite",
        "olmo2",
        "starcoder2",
        "stablelm",
    )
)
"""Tests that take every variant take these with the slow ones alone: every family is built, verified and decoded from a
published config in each run, and what else is special about these, another variant has too."""

VARIANTS: dict[str, Variant] = {
    "llama": Variant(chat_template=CHAT_TEMPLATE, cllm={"n": 8, "proposer": "repeat", "loop": "sliding"}),
    "llama-llama3-bf16-sharded": Variant(tied=False, rope=LLAMA3_ROPE, dtype="bfloat16", sharded=True, head_dim=24),
    "llama-linear-bias-mqa": Variant(rope=LINEAR_ROPE, num_kv_heads=1, config={"attention_bias": True}),
    "llama-yarn-fp16-mha": Variant(
        tied=False,
        rope=YARN_ROPE,
        num_kv_heads=4,
        dtype="float16",
        eos=(EOS, *range(40, 60)),
        config={"mlp_bias": True},
    ),
    "mistral": Variant(family="mistral", tied=False, config={"sliding_window": None}),
    "mistral-window": Variant(family="mistral", head_dim=8, num_kv_heads=1, config={"sliding_window": MAX_POSITIONS}),
    "qwen2": Variant(family="qwen2", eos=(EOS, *range(60, 80)), cllm={"n": 4, "proposer": "prompt", "loop": "block"}),
    "qwen2-window": Variant(
        family="qwen2",
        tied=False,
        num_kv_heads=1,
        config={"use_sliding_window": True, "sliding_window": MAX_POSITIONS, "max_window_layers": 1},
    ),
    "qwen3": Variant(family="qwen3", head_dim=32, sharded=True),
    "qwen3-untied-bias": Variant(family="qwen3", tied=False, num_kv_heads=4, config={"attention_bias": True}),
    "llama-dynamic": Variant(rope=DYNAMIC_ROPE, num_layers=1),
    "mistral-sliding": Variant(family="mistral", tied=False, config={"sliding_window": WINDOW}),
    "ministral": Variant(
        family="ministral",
        tied=False,
        head_dim=32,
        config={"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2-sliding": Variant(
        family="qwen2", config={"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "gemma": Variant(family="gemma", num_kv_heads=1, head_dim=32, embedding_scale=0.06),
    "gemma2": Variant(
        family="gemma2",
        tied=False,
        dtype="bfloat16",
        embedding_scale=0.06,
        config={
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 15.0,
        },
    ),
    "gemma3": Variant(
        family="gemma3_text",
        embedding_scale=0.06,
        rope=LAYERED_ROPE,
        config={
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
    "phi3": Variant(family="phi3", tied=False, num_kv_heads=4, config={"sliding_window": WINDOW}),
    "phi4-longrope": Variant(family="phi3", rope=LONGROPE, config={"original_max_position_embeddings": 64}),
    "granite": Variant(
        family="granite",
        config={
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
    ),
    "olmo2": Variant(family="olmo2", tied=False),
    "smollm3": Variant(family="smollm3", config={"no_rope_layer_interval": 2}),
    "starcoder2": Variant(family="starcoder2", config={"use_bias": True, "sliding_window": WINDOW}),
    "stablelm": Variant(family="stablelm", tied=False, rope=PARTIAL_ROPE, config={"use_qkv_bias": True}),
    "stablelm-parallel": Variant(
        family="stablelm",
        tied=False,
        num_layers=1,
        rope=PARTIAL_ROPE,
        config={"use_parallel_residual": True, "qk_layernorm": True},
    ),
}
"""The checkpoints that the parity tests export: every family, and every option at least once."""


def _realistic(family: str, *, heads: int, kv_heads: int, head_dim: int, **config: Any) -> Variant:
    """Two layers of a family with heads of a real size, a hidden size that they suit, and a cache of two thousand rows.

    TensorRT chooses kernels by these sizes: for the tiny ones it has other kernels, or none.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": heads, "vocab_size": 4096}
    return Variant(
        family=family,
        tied=False,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=2048,
        embedding_scale=0.06,
        weight_scale=0.06,
        rope=config.pop("rope", None),
        config={**sizes, **config},
    )


REALISTIC: dict[str, Variant] = {
    "real-llama": _realistic("llama", heads=8, kv_heads=2, head_dim=64),
    "real-mistral": _realistic("mistral", heads=8, kv_heads=2, head_dim=128, sliding_window=512),
    "real-ministral": _realistic(
        "ministral",
        heads=8,
        kv_heads=2,
        head_dim=128,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "real-qwen2": _realistic("qwen2", heads=8, kv_heads=2, head_dim=64),
    "real-qwen3": _realistic("qwen3", heads=8, kv_heads=2, head_dim=128),
    "real-gemma": _realistic("gemma", heads=4, kv_heads=1, head_dim=256),
    "real-gemma2": _realistic(
        "gemma2",
        heads=8,
        kv_heads=4,
        head_dim=128,
        sliding_window=512,
        query_pre_attn_scalar=128,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "real-gemma3": _realistic(
        "gemma3_text",
        heads=4,
        kv_heads=1,
        head_dim=256,
        rope=LAYERED_ROPE,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=256,
    ),
    "real-phi3": _realistic("phi3", heads=8, kv_heads=8, head_dim=96, hidden_size=768, sliding_window=512),
    "real-granite": _realistic("granite", heads=8, kv_heads=2, head_dim=64, embedding_multiplier=3.0),
    "real-olmo2": _realistic("olmo2", heads=8, kv_heads=8, head_dim=64),
    "real-smollm3": _realistic("smollm3", heads=8, kv_heads=2, head_dim=128, no_rope_layer_interval=2),
    "real-starcoder2": _realistic("starcoder2", heads=8, kv_heads=2, head_dim=64, use_bias=True, sliding_window=512),
    "real-stablelm": _realistic("stablelm", heads=8, kv_heads=8, head_dim=64, rope=PARTIAL_ROPE),
}
"""A checkpoint of every family for TensorRT's builder. Heads have 64 to 256 values, and one, two, four or eight
of them hold keys and values."""

UNTRAINABLE = {
    name: variant
    for name, variant in VARIANTS.items()
    if variant.config.get("sliding_window") == WINDOW or "attn_logit_softcapping" in variant.config
}
"""Those that training and decoding in PyTorch refuse."""
TRAINABLE = tuple(name for name in VARIANTS if name not in UNTRAINABLE)


def make_checkpoint(directory: Path, variant: Variant | None = None) -> Path:
    """Write a checkpoint with random weights, a tokenizer and a generation config; equal variants give equal bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    variant = variant or Variant()
    tokenizer = make_tokenizer()
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": variant.num_layers,
        "num_key_value_heads": variant.num_kv_heads,
        "head_dim": variant.head_dim or 16,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": variant.max_positions,
        "rope_parameters": dict(variant.rope or {"rope_type": "default", "rope_theta": 10000.0}),
        "tie_word_embeddings": variant.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **variant.config,
    }
    config = AutoConfig.for_model(variant.family, **settings)
    torch.manual_seed(variant.seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = variant.embedding_scale if "embed" in name else variant.weight_scale
            parameter.copy_(_random_like(name, parameter, scale))
    model = model.to(getattr(torch, variant.dtype))
    model.generation_config.eos_token_id = variant.eos if isinstance(variant.eos, int) else list(variant.eos)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size="60KB" if variant.sharded else "1GB")
    _write_tokenizer(tokenizer, directory)
    if variant.chat_template is not None:
        (directory / "chat_template.jinja").write_text(variant.chat_template, encoding="utf-8")
    if variant.cllm is not None:
        edit_json(directory / "config.json", cllm=dict(variant.cllm))
    return directory


def hub_snapshot(checkpoint: Path, model: Path) -> Path:
    """The same as a Hugging Face cache lays it out: each file a link into the blobs of its model."""
    blobs, snapshot = model / "blobs", model / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blobs / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def _random_like(name: str, parameter: Tensor, scale: float) -> Tensor:
    import torch

    noise = torch.randn(parameter.shape)
    if "norm" in name and not name.endswith("bias"):
        return 1 + 0.3 * noise
    return scale * noise


@functools.cache
def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens that puts ``<s>`` before a text; any text encodes, any ids decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "select the name where the city"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {**SPECIAL_TOKENS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def edit_json(path: Path, *, drop: Sequence[str] = (), **changes: Any) -> None:
    """Change keys of a JSON file in place."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in raw.items() if key not in drop}
    path.write_text(json.dumps({**kept, **changes}), encoding="utf-8")


def edit_weights(directory: Path, *, drop: Sequence[str] = (), **changes: Tensor) -> None:
    """Change tensors of an unsharded checkpoint in place; ``changes`` may add some."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file({**kept, **changes}, path, metadata={"format": "pt"})
