"""A request that fails: its error is the engine's, is told every time, and is hidden by no clean-up."""

from __future__ import annotations

import pytest

from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.request import RequestStatus
from cllm_export.runtime.decoding.scheduler import Scheduler
from tests.fakes import HashModel, make_model, write_bundle

PROMPT = [5, 6, 7]
PINNED = {"block_size": 4, "max_new_tokens": 8, "ignore_eos": True}
AUTO = {"block_size": "auto", "max_new_tokens": 8}
"""Before its first step, such a request measures what forwards take."""


@pytest.fixture
def model(tmp_path):
    return make_model(write_bundle(tmp_path / "bundle"), HashModel(vocab_size=200))


def fail(*_, **__):
    raise RuntimeError("dead")


@pytest.mark.parametrize("options", [PINNED, AUTO], ids=["in a step", "before the first step"])
def test_a_failed_stream_tells_its_error_every_time(model, monkeypatch, options):
    monkeypatch.setattr(model.engine, "forward", fail)
    stream = model.stream(PROMPT, **options)
    with pytest.raises(EngineError, match=r"the engine failed: RuntimeError\('dead'\)"):
        next(stream)
    with pytest.raises(EngineError, match=r"the engine failed: RuntimeError\('dead'\)"):
        stream.result()
    assert stream._run.status is RequestStatus.FAILED


@pytest.mark.parametrize("options", [PINNED, AUTO], ids=["in a step", "before the first step"])
def test_a_failed_request_gives_the_model_back(model, monkeypatch, options):
    forward = model.engine.forward
    monkeypatch.setattr(model.engine, "forward", fail)
    with pytest.raises(EngineError, match="the engine failed"):
        model.generate(PROMPT, **options)
    monkeypatch.setattr(model.engine, "forward", forward)
    assert len(model.generate(PROMPT, **PINNED).token_ids) == 8


def test_an_error_of_the_clean_up_hides_no_error(model, monkeypatch):
    monkeypatch.setattr(model.engine, "forward", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(Scheduler, "cancel", fail)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        model.generate(PROMPT, **PINNED)


def test_a_stream_that_cannot_be_left_in_order_has_failed(model, monkeypatch):
    """It ends all the same, and says what went wrong."""
    stream = model.stream(PROMPT, **PINNED)
    next(stream)
    monkeypatch.setattr(Scheduler, "cancel", fail)
    stream.close()
    with pytest.raises(EngineError, match="dead"):
        stream.result()
    assert stream._run.status is RequestStatus.FAILED
