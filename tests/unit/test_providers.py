"""Engines on a device: what is refused and why. That their tokens are right is shown in tests/acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cllm_export.errors import EngineError, GpuError, OptionError
from cllm_export.runtime import ort_device_engine
from cllm_export.runtime.generate import load
from cllm_export.runtime.ort_device_engine import OrtDeviceEngine
from cllm_export.runtime.providers import open_engine
from tests.conftest import PINNED, Workshop
from tests.fakes import write_bundle


def test_an_unknown_provider_is_refused_by_name(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(OptionError, match="provider must be one of cpu, cuda, tensorrt, got 'gpu'"):
        load(bundle.path, provider="gpu")  # type: ignore[arg-type]


def test_onnx_runtime_for_the_cpu_is_refused_with_the_line_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ort_device_engine, "require_gpu", lambda: None)
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(GpuError, match=r"has no CUDAExecutionProvider.*pip install 'cllm-export\[cuda\]'"):
        open_engine(bundle, "cuda")


def test_a_provider_that_did_not_start_is_no_silent_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime goes on with the CPU where CUDA's libraries are missing."""
    import onnxruntime

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort_device_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(GpuError, match="did not start its CUDAExecutionProvider"):
        OrtDeviceEngine(write_bundle(tmp_path / "bundle"))


def test_a_forward_that_cannot_be_right_is_refused(workshop: Workshop):
    engine = OrtDeviceEngine(workshop.bundle("small"), device="cpu", num_slots=2)
    for blocks, committed, write_index, message in (
        ([[1]], [1], [0], "each of 2 slots"),
        ([[1], [1]], [1, 1], [0, 10_000], "cache rows"),
        ([[1, 2], [1]], [1, 1], [0, 0], "failed in a forward on cpu"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.forward(blocks, committed, write_index)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.forward([[1], [1]], [1, 1], [0, 0])


def test_a_pinned_graph_takes_its_own_shapes_alone(workshop: Workshop):
    bundle = workshop.bundle("small", **PINNED)
    engine = OrtDeviceEngine(bundle, device="cpu")
    size = PINNED["block_size"]
    engine.prefill([[1] * size], [size], [0])
    assert len(engine.forward([[1] * size], [1], [size]).next_ids[0]) == size
    with pytest.raises(EngineError, match=f"pinned to blocks of {size}, got 4"):
        engine.forward([[1] * 4], [1], [0])
    with pytest.raises(EngineError, match="pinned to 1 slots"):
        OrtDeviceEngine(bundle, device="cpu", num_slots=2)


def test_onnx_runtime_says_nothing_of_a_copy_of_the_cache(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    engine = OrtDeviceEngine(workshop.bundle("small"), device="cpu", num_slots=1, log_severity=2)
    engine.forward([[1] * 8], [1], [0])
    engine.forward([[1] * 8], [1], [8])
    assert "in-place" not in capfd.readouterr().err
