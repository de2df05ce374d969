"""The checks that decode: the engine leaves memory before the checkpoint's model enters it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cllm_export.errors import EngineError
from cllm_export.verification import tokens
from cllm_export.verification.report import VerifyOptions
from cllm_export.verification.tokens import TokenSession
from tests.fakes import HashModel, greedy, make_model, write_bundle

NUM_TOKENS = 6


class Checkpoint:
    """A reference that predicts what the fake engine's model predicts."""

    tokenizer = None

    def __init__(self, model):
        self._model = model

    def predict(self, prompt, new):
        found = greedy(self._model, list(prompt), len(new))
        return [SimpleNamespace(token=token, margin=1.0, scale=1.0) for token in found]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A session over a fake engine, its model, and what was open when its checkpoint was asked for."""
    bundle = write_bundle(tmp_path / "bundle")
    language_model = HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2)
    model = make_model(bundle, language_model)
    monkeypatch.setattr(tokens, "load", lambda *_, **__: model)
    was_closed = []

    def reference():
        was_closed.append(model.engine.is_closed)
        return Checkpoint(language_model)

    options = VerifyOptions(max_new_tokens=NUM_TOKENS, block_sizes=(4,))
    return TokenSession(bundle, (), reference, options, lambda *_: None), model, was_closed


def test_the_engine_is_closed_before_the_checkpoint_is_opened(opened):
    session, _, was_closed = opened
    checks = {check.name: check for check in session.token_checks()}
    assert was_closed == [True]
    assert checks["against the PyTorch checkpoint"].passed, checks
    assert checks["across shapes, n = 1 against 4"].passed
    assert checks["jacobi == autoregressive, n = 4"].passed is not False


def test_an_engine_that_fails_is_reported_by_what_it_said(opened):
    """The error is of the decode, though the check that needs its tokens runs after the engine was closed."""
    session, model, _ = opened
    forward = model.engine.forward

    def failing(batch, **options):
        if len(batch.input_ids[0]) == 1 and not options.get("with_logits"):
            raise EngineError("no forward of one token")
        return forward(batch, **options)

    model.engine.forward = failing
    checks = {check.name: check for check in session.token_checks()}
    across = checks["across shapes"]
    assert across.passed is False
    assert across.detail == "no forward of one token"
    assert checks["against the PyTorch checkpoint"].passed
