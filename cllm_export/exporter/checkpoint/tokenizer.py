"""The ``tokenizer.json`` of a checkpoint that has a sentencepiece model alone: equal to sentencepiece, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cllm_export.errors import CheckpointError, CllmExportError, UnsupportedError
from cllm_export.exporter.checkpoint.sentencepiece_convert import build_tokenizer
from cllm_export.exporter.checkpoint.sentencepiece_judge import SentencePieceJudge
from cllm_export.exporter.checkpoint.sentencepiece_model import NEXT, SentencePieceModel, read_model
from cllm_export.exporter.checkpoint.sentencepiece_texts import texts_of


def convert_tokenizer(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that ``tokenizer.model`` describes. It was compared with sentencepiece on thousands of texts.

    Args:
        path: the directory of ``tokenizer.model`` and of the settings.
        settings: the contents of its ``tokenizer_config.json``.

    Raises:
        MissingExtraError: sentencepiece or protobuf is not installed; the error says what to install.
        CheckpointError: the model is damaged.
        UnsupportedError: no ``tokenizer.json`` gives the tokens of sentencepiece. The error shows a text.
    """
    model = read_model(path, settings)
    try:
        tokenizer = build_tokenizer(model)
    except CllmExportError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{model.name} cannot be converted to tokenizer.json: {error}") from None
    require_equal(tokenizer, model)
    return tokenizer


def require_equal(tokenizer: Tokenizer, model: SentencePieceModel) -> None:
    """Compare a converted tokenizer with sentencepiece, on ids and on text.

    Raises:
        UnsupportedError: they differ on one of the texts.
    """
    judge = SentencePieceJudge(model)
    for text in texts_of(model):
        expected, ids = judge.encode(text), tokenizer.encode(text).ids
        if ids != expected:
            raise _refusal(model, f"{text!r} has the tokens {expected} in sentencepiece, and {ids} converted")
        if not judge.has_added(text) and model.proto.trainer_spec.unk_id not in expected:
            back, converted = judge.decode(expected), tokenizer.decode(expected)
            if model.proto.normalizer_spec.remove_extra_whitespaces:  # it drops all spaces before a text
                back, converted = back.lstrip(" "), converted.lstrip(" ")
            if back != converted:
                raise _refusal(model, f"tokens {expected} are {back!r} in sentencepiece, and {converted!r} converted")


def _refusal(model: SentencePieceModel, what: str) -> UnsupportedError:
    return UnsupportedError(f"{model.name} cannot be converted to tokenizer.json without a difference: {what}; {NEXT}")
