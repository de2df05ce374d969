"""What a machine has no processors or no memory for is refused, with what there is, before it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.calibration.calibrate import CalibrateOptions
from cllm_export.errors import OptionError
from cllm_export.measure.options import BenchOptions
from cllm_export.runtime.engines import machine, onnxruntime
from cllm_export.runtime.engines.machine import available_memory, available_threads, require_memory, require_threads
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.verification.report import VerifyOptions
from tests.fakes import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def test_a_process_may_use_all_its_processors_and_no_more():
    require_threads(None)
    require_threads(available_threads())
    there = available_threads()
    with pytest.raises(OptionError) as refused:
        require_threads(there + 1)
    assert str(refused.value) == (
        f"threads must be at most {there}, the number of processors that this process may use, got {there + 1}"
    )


@pytest.mark.parametrize("options", [VerifyOptions, BenchOptions, CalibrateOptions])
def test_every_class_of_options_refuses_too_many_threads(options: Any):
    with pytest.raises(OptionError, match="threads must be at most"):
        options(threads=2000)


@pytest.mark.parametrize("threads", [0, 2000, 1.5, True])
def test_a_model_is_not_loaded_with_an_impossible_number_of_threads(bundle: Bundle, threads: Any):
    with pytest.raises(OptionError, match="threads must be"):
        load(bundle.path, threads=threads)


def test_a_cache_that_does_not_fit_is_refused_with_what_it_needs_and_what_is_there():
    require_memory(10, 100, free=1000)
    with pytest.raises(OptionError) as refused:
        require_memory(11, 100, free=1000)
    assert str(refused.value) == (
        "11 slots need 1,100 bytes for the KV cache, 100 each, and 1,000 bytes of memory are free: give at most "
        "num_slots=10"
    )
    with pytest.raises(OptionError, match="are free: build the bundle with a smaller max_length"):
        require_memory(1, 100, free=99)


def test_an_engine_allocates_no_cache_that_does_not_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """It has not read the graph either, which is none in this bundle."""
    monkeypatch.setattr(onnxruntime, "allocate", None)
    with pytest.raises(OptionError, match="1000000000000 slots need 20,224,000,000,000,000 bytes for the KV cache"):
        OrtEngine(bundle, num_slots=10**12)
    with pytest.raises(OptionError, match="slots need"):
        load(bundle.path, num_slots=10**12)


@pytest.mark.parametrize(
    ("limit", "left"),
    [("2000\n", 2000 - 1500 + 300), ("1000\n", 0), ("max\n", None)],
)
def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int | None):
    """Files that the system has cached for the container are memory that it can have."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = available_memory()
    assert free is None or free > 10_000
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("1500\n" if limit != "1000\n" else "1400\n")
    (tmp_path / "memory.stat").write_text("anon 1200\ninactive_file 300\nactive_file 7\n")
    if left is None:
        assert available_memory() is None or (available_memory() or 0) > 10_000
    else:
        assert available_memory() == left
