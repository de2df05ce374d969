"""Times of a busy machine are not kept, for ``auto`` would choose n by them."""

from __future__ import annotations

import pytest

from cllm_export.measure.bench import _compare_sizes, _leave_latency
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.decoding.block_size.latency_file import LATENCY_NAME, read_latency
from cllm_export.runtime.decoding.block_size.measured_times import settle_times
from tests.fakes import HashModel, make_model, write_bundle

STEADY = settle_times({1: [1.0] * 5, 8: [2.0] * 5})
BUSY = settle_times({1: [1.0, 4.0, 1.0, 4.0, 1.0], 8: [2.0] * 5})


def test_times_of_a_steady_machine_are_kept(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    _leave_latency([bundle], [STEADY], 1)
    assert read_latency(bundle, num_slots=1, threads=1) == {1: 1.0, 8: 2.0}


def test_times_of_a_busy_machine_are_not_kept_and_the_reason_is_told(tmp_path, caplog: pytest.LogCaptureFixture):
    bundle = write_bundle(tmp_path / "bundle")
    _leave_latency([bundle], [BUSY], 1)
    assert not (bundle.path / LATENCY_NAME).exists()
    assert "are not kept" in caplog.text
    assert "too busy to tell" in caplog.text


def test_a_single_bundle_is_compared_whatever_its_forwards_take_and_several_are_not(tmp_path):
    """A server that loads it then chooses among all exact sizes."""
    slow, nothing = {1: 9.0}, ExactSizes()
    one, *two = (
        make_model(write_bundle(tmp_path / name), HashModel(vocab_size=300), forward_seconds=slow, exact_sizes=nothing)
        for name in "abc"
    )
    for models in ([one], two):
        _compare_sizes(models, lambda *_: None)
    assert one.auto_sizes == (1, 2, 4, 8, 12, 16)
    assert [model.auto_sizes for model in two] == [None, None]


@pytest.mark.parametrize("times", [[None], [STEADY, STEADY]])
def test_times_of_a_pinned_bundle_or_of_several_are_not_kept(tmp_path, times):
    bundles = [write_bundle(tmp_path / f"bundle{index}") for index in range(len(times))]
    _leave_latency(bundles, times, 1)
    assert not any((bundle.path / LATENCY_NAME).exists() for bundle in bundles)
