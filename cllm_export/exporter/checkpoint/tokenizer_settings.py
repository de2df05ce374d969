"""Settings of ``tokenizer_config.json`` that contradict ``tokenizer.json``: which tokens stand around a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cllm_export.bundle.manifest import TOKENIZER_NAME
from cllm_export.errors import CheckpointError

OBEYED = ("Llama", "CodeLlama", "Gemma", "Cohere")
"""Beginnings of the tokenizer classes of transformers 4 that put the settings above ``tokenizer.json``."""


def refuse_contradictions(
    tokenizer: Tokenizer, settings: Mapping[str, Any], special_tokens: Mapping[str, str], path: Path
) -> None:
    """Refuse ``add_bos_token`` or ``add_eos_token`` if ``tokenizer.json`` does otherwise.

    transformers 5 ignores both settings beside a ``tokenizer.json``, and transformers 4 obeys them in some classes. So
    the prompts that the model was trained on depend on the version.

    Args:
        tokenizer: that of ``tokenizer.json``. Its truncation and padding are turned off.
        settings: the contents of ``tokenizer_config.json``.
        special_tokens: tokens by their names.
        path: the directory of both files.

    Raises:
        CheckpointError: a setting and ``tokenizer.json`` contradict each other.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("a").ids
    is_obeyed = str(settings.get("tokenizer_class")).startswith(OBEYED)
    for key, name, place in (("add_bos_token", "bos_token", ids[:1]), ("add_eos_token", "eos_token", ids[-1:])):
        stated, token = settings.get(key), special_tokens.get(name)
        is_added = token is not None and place == [tokenizer.token_to_id(token)]
        if token is None or not isinstance(stated, bool) or stated == is_added or not (stated or is_obeyed):
            continue
        does = f"adds {token!r} to a text" if is_added else f"does not add {token!r} to a text"
        raise CheckpointError(
            f"tokenizer_config.json of {path} has {key} {str(stated).lower()}, but its {TOKENIZER_NAME} {does}: the "
            f"prompts that the model knows may be either. Set {key} to {str(is_added).lower()} if {TOKENIZER_NAME} is "
            f"right, else correct the post_processor of {TOKENIZER_NAME}"
        )
