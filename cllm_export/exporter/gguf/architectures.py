"""The architectures of GGUF that are imported, and what is refused of a file before transformers is imported."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.checkpoint.families import FAMILIES
from cllm_export.exporter.gguf.header import GgufFile
from cllm_export.exporter.gguf.tokenizer import check_split, ends_of

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "starcoder2")
"""The architectures of GGUF whose family is supported, and for which transformers has tables. Mistral is ``llama``."""

EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"

_COUNTS = ("block_count", "context_length", "embedding_length", "attention.head_count")
"""Fields that every file has."""
_MORE_COUNTS = (
    *("feed_forward_length", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "vocab_size"),
)
_ABSURD = 2**31
_OTHER_MODELS = {
    **{"attention.scale": 0.0, "logit_scale": 0.0, "embedding_scale": 0.0, "residual_scale": 0.0},
    **{"attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attention.causal": True},
    **{"nextn_predict_layers": 0, "attention.key_length_mla": 0, "altup.num_inputs": 0},
}
"""Field that a converter writes for models of another form -> the value that means that it is unused."""
_NUMBERS = (
    *("rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_TEXTS = ("general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_FLAGS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix")
TOKENIZERS = ("gpt2", "llama")
"""Kinds of tokenizers that the families have: byte-level BPE and sentencepiece."""


def check_gguf(file: GgufFile) -> None:
    """Refuse by name what cannot be imported.

    Raises:
        UnsupportedError: the architecture, or a part of it, is not supported.
        CheckpointError: a field or the tokenizer is missing, or is absurd.
    """
    _check_architecture(file)
    for name in (*_COUNTS, *_MORE_COUNTS):
        _check_count(file, name, is_required=name in _COUNTS)
    _check_kinds(file)
    _check_layers(file)
    for name, unused in _OTHER_MODELS.items():
        if (value := file.get(name, unused)) != unused:
            raise UnsupportedError(
                f"{file.path} is a {file.architecture} of another form: {file.architecture}.{name} is {value!r}, which "
                "the family does not have; take the Hugging Face checkpoint of the model"
            )
    _check_tokenizer(file)
    check_split(file)


def _check_architecture(file: GgufFile) -> None:
    name = file.architecture
    if (experts := file.get("expert_count", 0)) or "moe" in name:
        raise UnsupportedError(
            f"{file.path} (architecture {name!r}) is a mixture of {experts or 'several'} experts, which is not "
            "supported: choose a dense model"
        )
    if name in ARCHITECTURES:
        return
    family = name in FAMILIES
    why = "transformers reads no GGUF of it" if family else "the graph cannot express it"
    advice = "build its Hugging Face checkpoint" if family else "choose a model of one of these"
    raise UnsupportedError(
        f"{file.path} has the architecture {name!r}, and {why}; imported are {', '.join(ARCHITECTURES)}: {advice}"
    )


def _check_count(file: GgufFile, name: str, *, is_required: bool) -> None:
    value, key = file.get(name), f"{file.architecture}.{name}"
    if value is None:
        if is_required:
            raise CheckpointError(f"{file.path} has no {key} in its metadata; download it again")
        return
    if isinstance(value, list):
        raise UnsupportedError(
            f"{file.path} has one {key} for each layer, and in the family all are alike; choose another model"
        )
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _ABSURD:
        raise _wrong(file, key, value, "no count")


def _check_kinds(file: GgufFile) -> None:
    """Check that numbers are numbers, and texts are texts."""
    for name in _NUMBERS:
        value = file.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise _wrong(file, f"{file.architecture}.{name}", value, "no number of 0 or more")
    for key in _TEXTS:
        if not isinstance(value := file.metadata.get(key, ""), str):
            raise _wrong(file, key, value, "no text")
    for key in _FLAGS:
        if not isinstance(value := file.metadata.get(key, True), bool):
            raise _wrong(file, key, value, "neither true nor false")
    if not isinstance(value := file.get("rope.scaling.type", ""), str):
        raise _wrong(file, f"{file.architecture}.rope.scaling.type", value, "no text")
    for name in ("attention.sliding_window", "rope.scaling.original_context_length"):
        if type(value := file.get(name, 1)) is not int or not 0 <= value < _ABSURD:
            raise _wrong(file, f"{file.architecture}.{name}", value, "no count")
    pattern = file.get("attention.sliding_window_pattern", 1)
    if type(pattern) is not int and not (isinstance(pattern, list) and all(type(each) is bool for each in pattern)):
        raise _wrong(file, f"{file.architecture}.attention.sliding_window_pattern", pattern, "no pattern of layers")


def _wrong(file: GgufFile, key: str, value: object, why: str) -> CheckpointError:
    return CheckpointError(f"{file.path} is damaged: {key} is {reprlib.repr(value)}, and {why}; download it again")


def _check_layers(file: GgufFile) -> None:
    """Compare the number of layers with the tensors, before a model of that size is made."""
    layers = {int(part[1]) for name in file.tensors if (part := name.split("."))[0] == "blk" and part[1].isdigit()}
    count = file.get("block_count")
    if layers != set(range(len(layers))) or len(layers) != count:
        raise CheckpointError(
            f"{file.path} has tensors of {len(layers)} layers, and {file.architecture}.block_count is {count}; "
            "download it again"
        )
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor {EMBEDDING!r}; download it again")


def _check_tokenizer(file: GgufFile) -> None:
    fields: Mapping[str, Any] = file.metadata
    tokens, kind = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise CheckpointError(
            f"{file.path} has no tokenizer ({'tokenizer.ggml.model' if tokens else 'tokenizer.ggml.tokens'} is "
            "missing): take a file that has one, or convert the model again without --no-vocab"
        )
    if kind not in TOKENIZERS:
        raise UnsupportedError(
            f"{file.path} has a tokenizer of kind {kind!r}; imported are {' and '.join(TOKENIZERS)}: build the "
            "Hugging Face checkpoint of the model"
        )
    if not _are_texts(tokens):
        raise CheckpointError(f"{file.path} is damaged: its tokens are no texts; download it again")
    _check_vocabulary(file, tokens)
    needed = "merges" if kind == "gpt2" else "scores"
    if not isinstance(fields.get(f"tokenizer.ggml.{needed}"), list) and "tokenizer.ggml.merges" not in fields:
        raise CheckpointError(f"{file.path} has a tokenizer without tokenizer.ggml.{needed}; download it again")
    for name in ("scores", "token_type"):
        values = fields.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            raise CheckpointError(
                f"{file.path} is damaged: it has {len(tokens)} tokens, and tokenizer.ggml.{name} does not fit them; "
                "download it again"
            )
    for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        _check_token_id(file, f"tokenizer.ggml.{key}_token_id", len(tokens))
    if not ends_of(file):
        raise CheckpointError(
            f"{file.path} names no token that ends a text (tokenizer.ggml.eos_token_id is missing): a model would not "
            "stop; take another file of the model"
        )


def _check_vocabulary(file: GgufFile, tokens: list[str]) -> None:
    """Refuse a token that is there twice, and more tokens than the embedding has rows."""
    if len(set(tokens)) < len(tokens):
        twice, count = Counter(tokens).most_common(1)[0]
        raise CheckpointError(
            f"{file.path} is damaged: it has the token {reprlib.repr(twice)} {count} times; download it again"
        )
    if len(tokens) > (rows := file.tensors[EMBEDDING].shape[0]):
        raise CheckpointError(
            f"{file.path} is damaged: it has {len(tokens)} tokens, and {EMBEDDING} has {rows} rows; download it again"
        )


def _check_token_id(file: GgufFile, key: str, num_tokens: int) -> None:
    value = file.metadata.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_tokens):
        raise CheckpointError(
            f"{file.path} is damaged: {key} is {value!r}, outside its vocabulary of {num_tokens}; download it again"
        )


def _are_texts(values: Iterable[object]) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
