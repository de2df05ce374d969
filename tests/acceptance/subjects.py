"""The engines that the acceptance suite is for, each with what a test must do beyond the ``Engine`` protocol.

``cpu`` runs everywhere and proves the suite itself; ``simulated`` is the TensorRT engine over a simulated GPU;
``cuda-graphs`` is ``cuda`` with forwards that ONNX Runtime records and replays. The others need what their markers say,
and are skipped with the reason where it is missing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.extras import install_line
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.engines.cuda import probe_driver
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from tests.conftest import THREADS
from tests.tensorrt import caches

BLOCK_SIZES = (1, 8, 16, 32, 64)


class Subject(Protocol):
    """An engine under test. ``close`` gives back what it took; ``free_memory`` is of its device, None of a host."""

    engine: Engine

    def read_cache(self) -> dict[str, np.ndarray]: ...

    def write_cache(self, cache: dict[str, np.ndarray]) -> None: ...

    def addresses(self) -> dict[str, int]: ...

    def close(self) -> None: ...

    def free_memory(self) -> int | None: ...


class OrtSubject:
    def __init__(self, bundle: Bundle, num_slots: int, **options: Any) -> None:
        self.engine: Any = OrtEngine(bundle, num_slots=num_slots, threads=THREADS, **options)

    def read_cache(self) -> dict[str, np.ndarray]:
        return {past: self.engine.read_cache(past) for past in self.engine.cache_addresses}

    def write_cache(self, cache: dict[str, np.ndarray]) -> None:
        for past, array in cache.items():
            self.engine.write_cache(past, array)

    def addresses(self) -> dict[str, int]:
        return self.engine.cache_addresses

    def close(self) -> None:
        self.engine.close()

    def free_memory(self) -> int | None:
        """ONNX Runtime's arena keeps what it once took, so that nothing can be told from the device."""
        return None


class TrtSubject:
    def __init__(self, bundle: Bundle, num_slots: int, gpu: Any) -> None:
        from cllm_export.tensorrt.build_plan import build_plan
        from cllm_export.tensorrt.engine import TrtEngine
        from cllm_export.tensorrt.plan_options import PlanOptions

        plan = build_plan(bundle, PlanOptions(batch_size=num_slots, block_sizes=BLOCK_SIZES), gpu=gpu)
        self._gpu = gpu
        self.engine: Any = TrtEngine(bundle, plan=plan, gpu=gpu)

    def read_cache(self) -> dict[str, np.ndarray]:
        return caches.read_cache(self.engine)

    def write_cache(self, cache: dict[str, np.ndarray]) -> None:
        caches.write_cache(self.engine, cache)

    def addresses(self) -> dict[str, int]:
        return caches.cache_addresses(self.engine)

    def close(self) -> None:
        self.engine.close()

    def free_memory(self) -> int | None:
        _, free, _ = self._gpu.cuda.runtime.cudaMemGetInfo()
        return int(free)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of engine, and the GPU that those of one test share."""

    name: str
    gpu: Any = None

    def open(self, bundle: Bundle, num_slots: int) -> Subject:
        if self.name in ORT_OPTIONS:
            return OrtSubject(bundle, num_slots, **ORT_OPTIONS[self.name])
        return TrtSubject(bundle, num_slots, self.gpu)


ORT_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "device-cpu": {"copies": True},
    "cuda": {"device": "cuda"},
    "cuda-graphs": {"device": "cuda", "cuda_graphs": True},
}
"""What an ``OrtEngine`` of each kind is opened with."""

KINDS = [
    "cpu",
    "device-cpu",
    "simulated",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cuda-graphs", marks=pytest.mark.gpu),
    pytest.param("tensorrt", marks=[pytest.mark.gpu, pytest.mark.tensorrt]),
]


def open_kind(name: str, directory: Path) -> Kind:
    """The kind of this name; skips the test, and says why, where this machine lacks it. The simulated one keeps its
    kernels in the directory."""
    if name == "simulated":
        from tests.tensorrt.simulation import SimulatedGpu

        simulated = SimulatedGpu()
        return Kind(name=name, gpu=replace(simulated.gpu, compiler=simulated.compiler(directory)))
    if name in ("cuda", "cuda-graphs", "tensorrt") and (reason := probe_driver()):
        pytest.skip(f"no GPU: {reason}")
    if name in ("cuda", "cuda-graphs"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    if name == "tensorrt":
        if missing := [each for each in ("tensorrt", "cuda") if importlib.util.find_spec(each) is None]:
            pytest.skip(f"{missing[0]} is not installed: {install_line('tensorrt')}")
        from cllm_export.tensorrt.library import open_gpu

        return Kind(name=name, gpu=open_gpu())
    return Kind(name=name)
