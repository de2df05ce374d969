"""The checkpoint's own tokenizer, with which the tokens of a bundle are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_export.bundle.manifest import TOKENIZER_NAME
from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.sentencepiece_judge import SentencePieceJudge
from cllm_export.exporter.checkpoint.sentencepiece_model import SENTENCEPIECE_NAME, read_model
from cllm_export.prompts import as_chat
from cllm_export.runtime.decoding.text import Messages

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that may add tokens to a ``tokenizer.json``, the most common first."""


class ReferenceTokenizer:
    """Encodes as the files of a checkpoint say, without any code of the build.

    A ``tokenizer.json`` is read as it is, with the settings beside it. ``AutoTokenizer`` may build another tokenizer
    from it: transformers 5 has classes, such as LlamaTokenizer, that take the vocabulary alone and replace the rest. A
    ``tokenizer.model`` alone is read by sentencepiece.

    Args:
        path: directory of the tokenizer.
        settings: the contents of its ``tokenizer_config.json``.

    Raises:
        CheckpointError: the files cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._judge: SentencePieceJudge | None = None
        if (path / TOKENIZER_NAME).is_file():
            given = [name for name in SETTINGS_FILES if (path / name).is_file()]
            self.side = " with ".join([f"the checkpoint's {TOKENIZER_NAME}", *given[:1]])
            self._file = self._load(PreTrainedTokenizerFast)
        else:
            self.side = f"sentencepiece with the checkpoint's {SENTENCEPIECE_NAME}"
            self._judge = SentencePieceJudge(read_model(path, settings))

    def encode(self, content: str | Messages) -> list[int]:
        """Token ids of a prompt (text or a chat), as the files of the checkpoint say."""
        is_text = isinstance(content, str)
        text = content if isinstance(content, str) else self._render(content)
        if self._judge:
            return self._judge.encode(text, add_special_tokens=is_text)
        return list(self._file(text, add_special_tokens=is_text)["input_ids"])

    def rebuilt(self, content: str | Messages) -> tuple[str, list[int]] | None:
        """What ``AutoTokenizer`` gives instead: its description, and its token ids. None if it gives the same."""
        if self._judge:
            return None
        is_text = isinstance(content, str)
        text = content if isinstance(content, str) else self._render(content)
        ids = list(self._auto(text, add_special_tokens=is_text)["input_ids"])
        if ids == self.encode(content):
            return None
        return f"AutoTokenizer of transformers {transformers.__version__} ({type(self._auto).__name__})", ids

    @cached_property
    def _auto(self) -> PreTrainedTokenizerBase:
        return self._load(AutoTokenizer)

    def _render(self, messages: Messages) -> str:
        chat = as_chat(messages)
        has_names = isinstance(self._auto.chat_template, dict)
        text: str = self._auto.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=None if chat.tools is None else [dict(tool) for tool in chat.tools],
            documents=None if chat.documents is None else [dict(document) for document in chat.documents],
            chat_template=chat.chat_template if has_names else None,
            add_generation_prompt=chat.is_prompted,
            continue_final_message=chat.continue_final_message,
            tokenize=False,
            **(chat.chat_template_kwargs or {}),
        )
        return text

    def _load(self, kind: Any) -> PreTrainedTokenizerBase:
        load: Callable[..., PreTrainedTokenizerBase] = kind.from_pretrained
        try:
            return load(self._path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated types for a bad file
            raise CheckpointError(f"transformers does not load the tokenizer of {self._path}: {error}") from None
