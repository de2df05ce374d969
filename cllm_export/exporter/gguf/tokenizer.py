"""Writes the tokenizer of a GGUF file as the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from cllm_export.errors import CheckpointError
from cllm_export.exporter.gguf.header import GgufFile


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template, as transformers converts and saves.

    The class that every fast tokenizer has is named, because ``AutoTokenizer`` would read the file with ``GGUFReader``.

    Raises:
        CheckpointError: transformers cannot convert the tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name
        )
    except Exception as error:  # transformers and tokenizers raise many unrelated types
        raise CheckpointError(
            f"{file.path} has a tokenizer that cannot be converted: {type(error).__name__}: {error}; take another file "
            "of the model"
        ) from None
    tokenizer.save_pretrained(directory)
