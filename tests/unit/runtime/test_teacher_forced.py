"""Teacher-forced text: every row predicts its next token, whatever the engine, and two models agree row by row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cllm_export.bundle.contract import FixedShapes
from cllm_export.bundle.quantization import Agreement
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.general_text import Passage, general_passages
from cllm_export.runtime.teacher_forced import (
    ForcedText,
    Reading,
    agreement,
    general_texts,
    perplexity,
    read_texts,
)
from tests.fakes import FakeEngine, HashModel, Row, make_geometry, write_bundle

PAD = 0
TOKENS = tuple(range(10, 57))  # more than a chunk, and no multiple of a block


def expected(model: HashModel, tokens: tuple[int, ...], first: int) -> tuple[int, ...]:
    """The model's own prediction after each prefix of the text."""
    rows = [Row(token, model.context(tokens[: index + 1])) for index, token in enumerate(tokens)]
    return tuple(model.predict(rows[:index]) for index in range(first, len(tokens)))


@pytest.mark.parametrize("fixed", [None, FixedShapes(batch_size=1, block_size=5, kv_length=64)])
@pytest.mark.parametrize("first", [1, 2, 33, 46])
def test_each_row_predicts_the_token_after_the_text_before_it(fixed, first):
    model = HashModel(vocab_size=100)
    engine = FakeEngine(model, make_geometry(vocab_size=100), fixed_shapes=fixed)
    [reading] = read_texts(engine, [ForcedText(TOKENS, first)], PAD)
    assert reading.predicted == expected(model, TOKENS, first)


def test_perplexity_is_that_of_the_tokens_of_the_text():
    """The fake's logits are compared with a softmax written out."""
    model, geometry = HashModel(vocab_size=100), make_geometry(vocab_size=100)
    [reading] = read_texts(FakeEngine(model, geometry), [ForcedText(TOKENS)], PAD)
    engine, total = FakeEngine(model, geometry), 0.0
    rows = [Row(token, model.context(TOKENS[: index + 1])) for index, token in enumerate(TOKENS)]
    for index in range(1, len(TOKENS)):
        logits = engine._logits(rows[:index], model.predict(rows[:index])).astype(np.float64)
        total += math.log(np.exp(logits[TOKENS[index]]) / np.exp(logits).sum())
    assert reading.log_probability == pytest.approx(total)
    assert perplexity([reading]) == pytest.approx(math.exp(-total / (len(TOKENS) - 1)))


def test_a_hopeless_model_has_a_finite_perplexity():
    assert perplexity([Reading((1,), -1e9)]) == pytest.approx(1e30)


def test_two_models_agree_where_they_predict_the_same_token():
    found = agreement([Reading((1, 2, 3), 0.0), Reading((4,), 0.0)], [Reading((1, 0, 3), 0.0), Reading((4,), -2.0)])
    assert found == Agreement(equal=3, of=4)
    assert found.share == 0.75 and str(found) == "75.0% of 4"


@pytest.mark.parametrize(("equal", "of"), [(1, 0), (-1, 3), (4, 3)])
def test_an_impossible_agreement_is_refused(equal, of):
    with pytest.raises(ValueError, match="cannot agree"):
        Agreement(equal=equal, of=of)


def test_the_packages_text_becomes_windows_that_the_model_can_read(tmp_path: Path):
    codec = TextCodec.of_bundle(write_bundle(tmp_path / "bundle"))
    passages = general_passages()
    texts = general_texts(codec, passages, max_length=64)
    assert len(texts) == 8 and all(len(text.tokens) == 64 for text in texts)
    first = [text.tokens for text in texts[:4]]
    assert first == [tuple(codec.encode(passage.text)[:64]) for passage in passages]


def test_a_text_of_one_token_is_refused(tmp_path: Path):
    codec = TextCodec.of_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(OptionError, match="fewer than two tokens: give a longer one"):
        general_texts(codec, [Passage(kind="own", text="a")], max_length=64)
