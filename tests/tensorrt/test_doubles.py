"""The doubles themselves: what real bindings refuse they refuse, in every version that is supported.

A mistake that a double let pass would be a mistake that the tests of plans and engines cannot see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.tensorrt.doubles import CudaDouble, Nonconforming, TensorRtDouble, describe, describe_rtx
from tests.tensorrt.install import CUDA, TENSORRT


@pytest.fixture(params=[*TENSORRT, "rtx"])
def trt(request: pytest.FixtureRequest) -> TensorRtDouble:
    return TensorRtDouble(describe_rtx() if request.param == "rtx" else describe("tensorrt", request.param))


@pytest.fixture(params=CUDA)
def cuda(request: pytest.FixtureRequest) -> CudaDouble:
    class Behaviour:
        def cudaMalloc(self, cuda: CudaDouble, size: int) -> int:
            return 4096

        def cudaFree(self, cuda: CudaDouble, devPtr: int) -> Any:
            return cuda.cudaError_t.cudaErrorInvalidValue

        def cudaMemcpyAsync(self, cuda: CudaDouble, **arguments: Any) -> None:
            return None

    return CudaDouble(describe("cuda", request.param)["runtime"], Behaviour())


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a class that there is not": lambda trt: trt.Bilder,
    "a method that there is not": lambda trt: trt.make("IBuilderConfig").set_flagg(trt.BuilderFlag.REFIT),
    "a member that an enum has not": lambda trt: trt.BuilderFlag.WEIGHTS_STREAMING,
    "an enum as a mapping": lambda trt: trt.BuilderFlag["REFIT"],
    "an enum's member as a number": lambda trt: 1 << trt.BuilderFlag.REFIT,
    "the member of another enum": lambda trt: trt.make("IBuilderConfig").set_flag(trt.MemoryPoolType.WORKSPACE),
    "a number for an enum": lambda trt: trt.make("IBuilderConfig").set_flag(4),
    "an argument too few": lambda trt: trt.make("IBuilderConfig").set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    "an argument too many": lambda trt: trt.make("Builder").create_network(0, 1),
    "an unknown keyword": lambda trt: trt.make("IBuilderConfig").set_timing_cache(
        trt.make("ITimingCache"), ignore=True
    ),
    "a keyword given twice": lambda trt: trt.make("Builder").create_network(0, flags=1),
    "text for a number": lambda trt: trt.make("IExecutionContext").set_tensor_address("past_key.0", "here"),
    "a path for the content": lambda trt: trt.make("Runtime").deserialize_cuda_engine("model.plan"),
    "a logger that is none": lambda trt: trt.Builder(object()),
    "None for an object": lambda trt: trt.OnnxParser(None, trt.Logger()),
    "floats in a shape": lambda trt: trt.make("IOptimizationProfile").set_shape("input_ids", (1, 1), (1, 2.0), (1, 4)),
    "a write to what is read-only": lambda trt: setattr(trt.make("IBuilderConfig"), "num_optimization_profiles", 2),
    "a write to a method": lambda trt: setattr(trt.make("IBuilderConfig"), "set_flag", 2),
    "a write to what there is not": lambda trt: setattr(trt.make("IBuilderConfig"), "max_workspace_size", 1),
    "a value of the wrong kind written": lambda trt: setattr(
        trt.make("IBuilderConfig"), "builder_optimization_level", "3"
    ),
    "precision by a flag, as before 10.0": lambda trt: trt.make("Builder").build_engine(None, None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_against_the_double(trt: TensorRtDouble, mistake: str):
    with pytest.raises((Nonconforming, AttributeError, TypeError)):
        MISTAKES[mistake](trt)


def test_what_is_right_passes_and_is_recorded(trt: TensorRtDouble):
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(flags=1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.builder_optimization_level = 4
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    trt.OnnxParser(network, logger)
    assert config.builder_optimization_level == 4
    assert trt.called("IBuilderConfig.set_memory_pool_limit") == [
        {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 1 << 30}
    ]
    assert trt.called("set IBuilderConfig.builder_optimization_level") == [{"value": 4}]


def test_versions_differ_where_they_do():
    old, new = (TensorRtDouble(describe("tensorrt", version)) for version in (TENSORRT[0], TENSORRT[1]))
    assert "FP16" in old.BuilderFlag.__members__
    assert "FP16" not in new.BuilderFlag.__members__
    assert old.make("IBuilderConfig").int8_calibrator is not None
    with pytest.raises(Nonconforming):
        _ = new.make("IBuilderConfig").int8_calibrator


def test_a_class_of_ours_may_derive_from_one_of_theirs(trt: TensorRtDouble):
    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            self.lines.append(msg)

    log = Log()
    trt.Builder(log)
    log.log(trt.ILogger.Severity.ERROR, "a line")
    assert log.lines == ["a line"]


CUDA_MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a function that there is not": lambda cuda: cuda.cudaAlloc(16),
    "an argument too few": lambda cuda: cuda.cudaMalloc(),
    "an argument too many": lambda cuda: cuda.cudaMalloc(16, 0),
    "an unknown keyword": lambda cuda: cuda.cudaMalloc(bytes=16),
    "a number for an enum": lambda cuda: cuda.cudaMemcpyAsync(1, 2, 3, 1, 0),
    "a member of a structure that there is not": lambda cuda: cuda.structure("cudaDeviceProp", title=b"a card"),
}


@pytest.mark.parametrize("mistake", CUDA_MISTAKES)
def test_a_mistake_fails_against_the_double_of_cuda(cuda: CudaDouble, mistake: str):
    with pytest.raises(Nonconforming):
        CUDA_MISTAKES[mistake](cuda)


def test_a_call_of_cuda_gives_a_code_and_what_it_made(cuda: CudaDouble):
    assert cuda.cudaMalloc(16) == (cuda.cudaError_t.cudaSuccess, 4096)
    assert cuda.cudaFree(4096) == (cuda.cudaError_t.cudaErrorInvalidValue,)
    kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert cuda.cudaMemcpyAsync(1, 2, 3, kind, 0) == (cuda.cudaError_t.cudaSuccess,)
