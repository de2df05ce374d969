"""Converts the tokenizer of a checkpoint that has only a sentencepiece model to the form that the runtime reads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from cllm_export.errors import CheckpointError
from cllm_export.extras import needs_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE_NAME = "tokenizer.model"


def convert_tokenizer(path: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that ``tokenizer.model`` and ``tokenizer_config.json`` describe, in the form of ``tokenizer.json``.

    transformers does the conversion but loses two behaviours of its sentencepiece tokenizer; they are restored here.
    A Llama tokenizer adds the beginning-of-sequence token unless its settings say otherwise. If it is ``legacy``,
    sentencepiece adds a space before a text even if the text already begins with a space.

    Args:
        path: the checkpoint directory.
        settings: the contents of its ``tokenizer_config.json``.

    Raises:
        MissingExtraError: sentencepiece or protobuf is not installed; the error says what to install.
        CheckpointError: the model is damaged.
    """
    with needs_extra("sentencepiece"):
        importlib.import_module("sentencepiece")
        importlib.import_module("google.protobuf")
    from transformers import AutoTokenizer

    is_llama = str(settings.get("tokenizer_class")).startswith("Llama")
    defaults = {"add_bos_token": True} if is_llama and settings.get("add_bos_token") is None else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **defaults
        )
        if is_llama and settings.get("legacy") in (None, True):
            _prefix_every_text(tokenizer.backend_tokenizer)
    except Exception as error:  # transformers raises many unrelated types for a bad file
        raise CheckpointError(f"{path / SENTENCEPIECE_NAME} is no sentencepiece model: {error}") from None
    return tokenizer


def _prefix_every_text(tokenizer: Tokenizer) -> None:
    metaspace = tokenizer.pre_tokenizer
    if isinstance(metaspace, pre_tokenizers.Metaspace) and metaspace.prepend_scheme != "never":
        spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
        tokenizer.pre_tokenizer = None
