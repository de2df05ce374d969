"""Builds the tokenizer of ``tokenizer.json`` from the pieces and the normalizer of a sentencepiece model.

transformers converts through the class that the model's family has, which assumes a prefix, an order of merges or a
normalizer of its own. Here everything comes from the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cllm_export.exporter.checkpoint.sentencepiece_model import NORMAL, USER_DEFINED, SentencePieceModel

SPACE = "\u2581"
"""What stands for a space in a piece."""


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """The tokenizer that a sentencepiece model describes, with its added tokens."""
    tokenizer = Tokenizer(_bpe(model))
    if steps := list(_normalizers(model)):
        tokenizer.normalizer = normalizers.Sequence(steps)
    if splits := list(_pre_tokenizers(model)):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Sequence(list(_decoders(model)))
    tokenizer.post_processor = _post_processor(model)
    tokens = [token for _, token in model.added.values()]  # their ids are in the vocabulary already
    tokenizer.add_special_tokens([token for token in tokens if token.special])
    tokenizer.add_tokens([token for token in tokens if not token.special])
    return tokenizer


def user_defined(model: SentencePieceModel) -> list[str]:
    """The pieces that sentencepiece takes whole wherever they stand, the longest first."""
    renamed = {index for index, _ in model.added.values()}
    found = [
        piece.piece
        for index, piece in enumerate(model.proto.pieces)
        if piece.type == USER_DEFINED and index not in renamed
    ]
    return sorted(found, key=len, reverse=True)


def _names(model: SentencePieceModel) -> dict[int, str]:
    """Id -> token. An added token replaces the piece whose id it takes."""
    names = {index: piece.piece for index, piece in enumerate(model.proto.pieces)}
    return names | {index: text for text, (index, _) in model.added.items()}


def _normal(model: SentencePieceModel) -> dict[str, float]:
    """The normal pieces, and their scores."""
    names = _names(model)
    return {
        piece.piece: piece.score
        for index, piece in enumerate(model.proto.pieces)
        if piece.type == NORMAL and names[index] == piece.piece
    }


def _bpe(model: SentencePieceModel) -> models.BPE:
    """BPE whose merges are ordered by the score of the piece that they make, as sentencepiece takes them.

    sentencepiece keeps pieces apart that users defined. They are split off first, and taken whole.
    """
    spec, scores, names = model.proto.trainer_spec, _normal(model), _names(model)
    vocab = {text: index for index, text in names.items()}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=names[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=bool(user_defined(model)),
    )


def _normalizers(model: SentencePieceModel) -> Iterator[Any]:
    spec = model.proto.normalizer_spec
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if spec.escape_whitespaces:
        yield normalizers.Replace(" ", SPACE)
    if spec.add_dummy_prefix and model.prefix_all:
        yield normalizers.Prepend(_space(model))


def _pre_tokenizers(model: SentencePieceModel) -> Iterator[Any]:
    spec = model.proto.normalizer_spec
    if spec.add_dummy_prefix and not model.prefix_all:
        # The first adds a space to the first part of the text, though it begins with one: there it is escaped already.
        yield pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
        if spec.escape_whitespaces:
            yield pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    if own := user_defined(model):
        yield pre_tokenizers.Split(Regex("|".join(map(_escaped, own))), "isolated")


def _escaped(text: str) -> str:
    """A pattern that matches this text alone."""
    return re.sub(r"[^\w]", lambda match: rf"\x{{{ord(match[0]):x}}}", text)


def _decoders(model: SentencePieceModel) -> Iterator[Any]:
    spec = model.proto.normalizer_spec
    yield decoders.Replace(SPACE, " ")
    if model.proto.trainer_spec.byte_fallback:
        yield decoders.ByteFallback()
    yield decoders.Fuse()
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        yield decoders.Strip(content=" ", left=1, right=0)


def _post_processor(model: SentencePieceModel) -> Any:
    around = [text for text in (model.first, model.last) if text]
    single = [*([model.first] if model.first else []), "$A", *([model.last] if model.last else [])]
    pair = [text.replace("$A", "$B") + ":1" for text in single]
    return processors.TemplateProcessing(
        single=single, pair=[*single, *pair], special_tokens=[(text, model.added[text][0]) for text in set(around)]
    )


def _space(model: SentencePieceModel) -> str:
    return SPACE if model.proto.normalizer_spec.escape_whitespaces else " "
