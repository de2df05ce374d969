"""Reads a ``tokenizer.model`` with the files beside it: pieces, added tokens, and what stands around a text."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from cllm_export.errors import CheckpointError, UnsupportedError
from cllm_export.exporter.checkpoint.files import read_json
from cllm_export.extras import needs_extra

SENTENCEPIECE_NAME = "tokenizer.model"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces in a sentencepiece model."""
BPE = 2
"""The type of sentencepiece models that are converted."""

WITH_BOS = ("Llama", "CodeLlama", "Gemma")
"""Tokenizer classes of transformers, by their beginning, that put the beginning of sequence first by default."""
WITHOUT_BOS = ("PreTrainedTokenizer", "TokenizersBackend")
"""Tokenizer classes, by their beginning, that do not."""

NEXT = "put the tokenizer.json that the model was trained or published with beside it: build takes that file as it is"
"""What to do about a model that is refused."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SentencePieceModel:
    """A sentencepiece model, and the settings of its tokenizer in transformers."""

    path: Path
    proto: Any
    """The ``ModelProto``. ``add_prefix_space: false`` of the settings is already in it."""
    added: Mapping[str, tuple[int, AddedToken]]
    """Text -> id and flags of the tokens that are looked for in a text before sentencepiece reads it."""
    first: str | None
    """The token before each text."""
    last: str | None
    """The token behind each text."""
    prefix_all: bool
    """Whether each part of a text between added tokens gets the dummy prefix, and not the first part alone."""

    @property
    def name(self) -> Path:
        return self.path / SENTENCEPIECE_NAME


def read_model(path: Path, settings: Mapping[str, Any]) -> SentencePieceModel:
    """Read ``tokenizer.model`` of a directory, with the contents of its ``tokenizer_config.json``.

    Raises:
        MissingExtraError: sentencepiece or protobuf is not installed; the error says what to install.
        CheckpointError: the model is damaged, or the files contradict each other.
        UnsupportedError: the model has a type that is not converted, or the settings leave something open.
    """
    with needs_extra("sentencepiece"):
        library = importlib.import_module("sentencepiece")
        importlib.import_module("google.protobuf")
        messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    name = path / SENTENCEPIECE_NAME
    try:
        proto = messages.ModelProto.FromString(name.read_bytes())
        library.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # both libraries raise unrelated types for a bad file
        raise CheckpointError(f"{name} is no sentencepiece model: {error}") from None
    _refuse(name, proto)
    if settings.get("add_prefix_space") is False:
        proto.normalizer_spec.add_dummy_prefix = False
    file = path / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and file.is_file():
        settings = {**settings, **read_json(file)}
    added = _added_tokens(path, settings, proto)
    return SentencePieceModel(
        path=path,
        proto=proto,
        added=added,
        first=_around(name, settings, "bos", added, proto, default=_adds_bos(name, settings, proto)),
        last=_around(name, settings, "eos", added, proto, default=False),
        prefix_all=settings.get("legacy") is not False,
    )


def _refuse(name: Path, proto: Any) -> None:
    """Refuse what ``tokenizer.json`` cannot express.

    A unigram model sums scores in single precision in sentencepiece, and in double precision in the tokenizers library:
    of two sums that are equal but for rounding, they take different ones.
    """
    kind = proto.trainer_spec.model_type
    if kind != BPE:
        stated = proto.trainer_spec.ModelType.Name(kind).lower()
        raise UnsupportedError(f"{name} is a {stated} model, and only BPE converts without a difference; {NEXT}")
    if any(piece.type == UNUSED for piece in proto.pieces):
        raise UnsupportedError(f"{name} has pieces marked as unused, which tokenizer.json cannot express; {NEXT}")


def _added_tokens(path: Path, settings: Mapping[str, Any], proto: Any) -> dict[str, tuple[int, AddedToken]]:
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    added = {
        piece.piece: (index, _token(piece.piece, special=True))
        for index, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL)
    }
    for index, value in _listed(path, settings):
        content, token = _content(value), _token(value)
        if not content or not isinstance(index, int) or index < 0:
            raise CheckpointError(f"{path} lists an added token {value!r} with the id {index!r}; list text and number")
        known = added[content][0] if content in added else pieces.get(content, index)
        if known != index:
            raise CheckpointError(f"{path} gives the added token {content!r} two ids, {known} and {index}; keep one")
        for replaced in [text for text, (other, _) in added.items() if other == index]:
            del added[replaced]
        added[content] = (index, token)
    for value in _named(settings):
        content = _content(value)
        if not content:
            continue
        following = max([len(pieces) - 1, *(index for index, _ in added.values())]) + 1
        index, token = added.get(content) or (pieces.get(content, following), _token(value))
        token.special = True
        added[content] = (index, token)
    return added


def _listed(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[object, Any]]:
    """Id and token of each token that ``added_tokens_decoder`` or ``added_tokens.json`` lists."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for index, value in decoder.items():
            yield int(index) if str(index).isascii() and str(index).isdigit() else index, value
    elif (file := path / "added_tokens.json").is_file():
        for content, index in sorted(read_json(file).items(), key=lambda item: str(item[1]).zfill(20)):
            yield index, content


def _named(settings: Mapping[str, Any]) -> Iterator[Any]:
    """The tokens that have a name, such as bos_token, or that are listed as special."""
    for name in NAMED:
        yield settings.get(name)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(name)
        if isinstance(extra, list | dict):
            yield from extra.values() if isinstance(extra, dict) else extra


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _token(value: Any, *, special: bool = False) -> AddedToken:
    """An added token with its flags. It is looked for in the text as it was given: ``normalized`` is left out."""
    flags = value if isinstance(value, dict) else {}
    return AddedToken(
        _content(value) or "",
        lstrip=bool(flags.get("lstrip")),
        rstrip=bool(flags.get("rstrip")),
        single_word=bool(flags.get("single_word")),
        special=special or bool(flags.get("special")),
        normalized=False,
    )


def _adds_bos(name: Path, settings: Mapping[str, Any], proto: Any) -> bool:
    """Whether the tokenizer's class puts the beginning of sequence first if its settings do not say so."""
    kind = settings.get("tokenizer_class")
    if kind is None:
        return bool(proto.trainer_spec.bos_id >= 0)
    if str(kind).startswith(WITH_BOS):
        return True
    if settings.get("add_bos_token") is None and not str(kind).startswith(WITHOUT_BOS):
        raise UnsupportedError(
            f"{name} belongs to a {kind}, and it is unknown whether that puts the beginning of sequence first: "
            "set add_bos_token to true or false in tokenizer_config.json"
        )
    return False


def _around(
    name: Path, settings: Mapping[str, Any], side: str, added: Mapping[str, object], proto: Any, *, default: bool
) -> str | None:
    """The token that the tokenizer puts before (bos) or behind (eos) a text."""
    wanted = settings.get(f"add_{side}_token")
    if not (default if wanted is None else wanted):
        return None
    token = next((text for text in _sides(settings, side, proto) if text in added), None)
    if token is None:
        raise CheckpointError(
            f"{name} is to put a {side}_token around each text, but has none: name it in tokenizer_config.json, or set "
            f"add_{side}_token to false"
        )
    return token


def _sides(settings: Mapping[str, Any], side: str, proto: Any) -> Iterator[str]:
    if named := _content(settings.get(f"{side}_token")):
        yield named
    index = getattr(proto.trainer_spec, f"{side}_id")
    if 0 <= index < len(proto.pieces):
        yield proto.pieces[index].piece
