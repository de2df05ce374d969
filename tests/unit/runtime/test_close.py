"""A model that is closed has given back what its engines hold, and says so to whoever still asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.contract import Batch
from cllm_export.errors import EngineError
from cllm_export.measure.traces import RecordingEngine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.model import Model
from cllm_export.runtime.service import Service
from tests.conftest import THREADS, Workshop
from tests.fakes import FakeEngine, HashModel, make_model, write_bundle

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "block_size": 4}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_model(write_bundle(tmp_path / "bundle"), HashModel(vocab_size=200))


def engine_of(model: Model) -> FakeEngine:
    assert isinstance(model.engine, FakeEngine)
    return model.engine


def test_closing_closes_the_engine_once_and_ends_the_models_use(model: Model):
    model.generate([5, 6], **OPTIONS)
    model.close()
    assert engine_of(model).is_closed
    engine_of(model).is_closed = False
    model.close()
    assert not engine_of(model).is_closed
    for use in (
        lambda: model.generate([5, 6], **OPTIONS),
        lambda: list(model.stream([5, 6], **OPTIONS)),
        lambda: Service(model),
    ):
        with pytest.raises(EngineError, match="this model is closed; load its bundle again"):
            use()


def test_a_with_closes(model: Model):
    with model as same:
        assert same is model
        assert not engine_of(model).is_closed
    assert engine_of(model).is_closed


def test_a_model_in_use_is_not_closed_under_whoever_uses_it(model: Model):
    with model.stream([5, 6], **OPTIONS) as stream:
        next(stream)
        with pytest.raises(EngineError, match="another request is running"):
            model.close()
        assert not engine_of(model).is_closed
    with Service(model), pytest.raises(EngineError, match="another request is running"):
        model.close()
    model.close()
    assert engine_of(model).is_closed


def test_an_error_is_not_hidden_by_a_stream_that_it_left_open(model: Model):
    with pytest.raises(ZeroDivisionError), model:
        stream = model.stream([5, 6], **OPTIONS)
        next(stream)
        raise ZeroDivisionError
    assert not engine_of(model).is_closed


def test_onnx_runtimes_session_is_dropped(workshop: Workshop):
    engine = OrtEngine(workshop.bundle("small"), threads=THREADS)
    engine.forward(Batch([[5, 6]], [1], [0]))
    engine.close()
    engine.close()
    for run in (
        lambda: engine.forward(Batch([[5, 6]], [1], [0])),
        lambda: engine.prefill(Batch([[5, 6]], [2], [0])),
        lambda: engine.read_cache("past_key.0"),
        lambda: engine.read_rows(0, 0, 1),
        engine.require_lookahead,
    ):
        with pytest.raises(EngineError, match="this engine is closed; load the bundle again"):
            run()
    assert not engine.cache_addresses


def test_an_engine_that_runs_another_closes_it(model: Model):
    RecordingEngine(model.engine).close()
    assert engine_of(model).is_closed
