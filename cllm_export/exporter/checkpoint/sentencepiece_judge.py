"""sentencepiece itself, which says what tokens a text has. The converted tokenizer is compared with it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from cllm_export.exporter.checkpoint.sentencepiece_model import SentencePieceModel


class SentencePieceJudge:
    """Encodes as the original tokenizer does: added tokens first, and sentencepiece for what lies between them.

    Nothing of the conversion is used.
    """

    def __init__(self, model: SentencePieceModel) -> None:
        self._model = model
        self._begin = _processor(model.proto)
        without = type(model.proto)()
        without.CopyFrom(model.proto)
        without.normalizer_spec.add_dummy_prefix = model.proto.normalizer_spec.add_dummy_prefix and model.prefix_all
        self._later = _processor(without)
        self._pattern = _pattern(model)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. The special tokens around it are those of the tokenizer's settings."""
        ids = list(self._between(text))
        if not add_special_tokens:
            return ids
        around = [[self._model.added[token][0]] if token else [] for token in (self._model.first, self._model.last)]
        return [*around[0], *ids, *around[1]]

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids that are pieces of the model."""
        return str(self._begin.decode(token_ids))

    def has_added(self, text: str) -> bool:
        """Whether an added token stands in a text."""
        return any(self._found(text))

    def _between(self, text: str) -> Iterator[int]:
        position = 0
        for token, start, end in self._found(text):
            yield from self._part(text, position, start)
            yield self._model.added[token][0]
            position = end
        yield from self._part(text, position, len(text))

    def _found(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Each added token in a text, and where it begins and ends with the white space that it takes."""
        for match in self._pattern.finditer(text) if self._pattern else ():
            flags, (start, end) = self._model.added[match[0]][1], match.span()
            around = text[start - 1 : start] + text[end : end + 1]
            if flags.single_word and re.search(r"\w", around):
                continue
            if flags.lstrip:
                start = len(text[:start].rstrip())
            if flags.rstrip:
                end = len(text) - len(text[end:].lstrip())
            yield match[0], start, end

    def _part(self, text: str, start: int, end: int) -> list[int]:
        processor = self._begin if start == 0 else self._later
        ids: list[int] = processor.encode(text[start:end]) if end > start else []
        return ids


def _processor(proto: Any) -> Any:
    return importlib.import_module("sentencepiece").SentencePieceProcessor(model_proto=proto.SerializeToString())


def _pattern(model: SentencePieceModel) -> re.Pattern[str] | None:
    """Matches an added token, the longest first."""
    if not model.added:
        return None
    starts = "".join(sorted({re.escape(text[0]) for text in model.added}))
    texts = sorted(model.added, key=len, reverse=True)
    return re.compile(rf"(?=[{starts}])(?:{'|'.join(map(re.escape, texts))})")
