"""The check of the checks: deliberate mistakes in the code for a GPU, each of which the doubles must find.

A source file is taken with one line made wrong, and a plan is built and run with it. A mistake that gave the right
tokens and no error here could be made for real, and nobody would see it before a GPU does. Mistakes that the builder
of TensorRT for RTX finds are not here: ``tests/tensorrt/rtx`` builds with it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from cllm_export.bundle.contract import Batch
from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import PlanError
from cllm_export.runtime.engines import cuda
from cllm_export.tensorrt import build_plan as plan_module
from cllm_export.tensorrt import engine as trt_engine
from cllm_export.tensorrt import graph as trt_graph
from tests.conftest import Workshop
from tests.tensorrt.doubles import Nonconforming
from tests.tensorrt.simulation import SimulatedGpu

GIVES_OTHERS = ""
"""The phrase of a mistake that raises nothing: the forwards give something else."""


class Mutation(NamedTuple):
    """What stands in a module, what a mistake would make of it, and the error that tells of the mistake."""

    module: ModuleType
    right: str
    wrong: str
    phrase: str
    """Of the message. Any other error comes of a mutation that breaks more than it says."""
    error: type[BaseException] = Nonconforming


MUTATIONS = [
    Mutation(
        plan_module,
        "1 << int(self._tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)",
        "0",
        "the network is not strongly typed",
    ),
    Mutation(plan_module, "ignore_mismatch=False", "ignore=False", "unknown or repeated keyword 'ignore'"),
    Mutation(
        plan_module,
        "tensorrt.MemoryPoolType.WORKSPACE",
        "tensorrt.BuilderFlag.REFIT",
        "pool is a tensorrt_bindings.tensorrt.MemoryPoolType",
    ),
    Mutation(
        plan_module, "set_memory_pool_limit(", "set_max_workspace_size(", "IBuilderConfig has no set_max_workspace_size"
    ),
    Mutation(plan_module, "network.unmark_output(", "network.unmark(", "INetworkDefinition has no unmark"),
    Mutation(
        plan_module,
        "create_timing_cache(known)",
        "create_timing_cache(str(path))",
        "serialized_timing_cache is a typing_extensions.Buffer",
    ),
    Mutation(plan_module, '"AMPERE_PLUS"', '"AMPERE"', "has no attribute 'AMPERE'", AttributeError),
    Mutation(plan_module, '"STRIP_PLAN"', '"STRIP"', "has no attribute 'STRIP'", AttributeError),
    Mutation(plan_module, "config.get_timing_cache()", "config.timing_cache", "IBuilderConfig has no timing_cache"),
    Mutation(plan_module, '"n": n[index]', '"n": n[0]', "the plan does not take input_ids of shape [1, 16]", PlanError),
    Mutation(trt_graph, "reader.num_errors", "reader.nb_errors", "OnnxParser has no nb_errors"),
    Mutation(
        trt_engine, "self._trt.Runtime(self._log.logger)", "self._trt.Runtime()", "Runtime.__init__: misses 'logger'"
    ),
    Mutation(trt_engine, "engine_host_code_allowed", "host_code_allowed", "Runtime has no host_code_allowed"),
    Mutation(
        trt_engine,
        "weight_streaming_budget_v2 =",
        "weight_streaming_budget =",
        "ICudaEngine has no weight_streaming_budget",
    ),
    Mutation(
        trt_engine,
        "get_device_memory_size_for_profile_v2",
        "get_device_memory_size_for_profile",
        "ICudaEngine has no get_device_memory_size_for_profile",
    ),
    Mutation(
        trt_engine,
        "strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED",
        "strategy = 2",
        "strategy is a tensorrt_bindings.tensorrt.ExecutionContextAllocationStrategy",
    ),
    Mutation(
        trt_engine,
        "AllocationStrategy.USER_MANAGED",
        "AllocationStrategy.STATIC",
        "a context would allocate scratch memory of its own",
    ),
    Mutation(
        trt_engine,
        "set_device_memory(self._scratch, self._scratch_size)",
        "set_device_memory(self._scratch)",
        "IExecutionContext.set_device_memory: misses 'size'",
    ),
    Mutation(
        trt_engine,
        "set_optimization_profile_async(profile, ",
        "set_optimization_profile_async(",
        "set_optimization_profile_async: misses 'stream_handle'",
    ),
    Mutation(
        trt_engine,
        "context.set_input_shape(spec.name, dims)",
        "context.set_binding_shape(spec.name, dims)",
        "IExecutionContext has no set_binding_shape",
    ),
    Mutation(
        trt_engine,
        "context.set_input_shape(spec.name, dims)",
        "context.set_input_shape(spec.name, *dims)",
        "IExecutionContext.set_input_shape: takes 2 arguments, got 3",
    ),
    Mutation(
        trt_engine,
        "execute_async_v3(int(self._stream))",
        "execute_async_v2(int(self._stream))",
        "IExecutionContext has no execute_async_v2",
    ),
    Mutation(
        trt_engine,
        "execute_async_v3(int(self._stream))",
        "execute_async_v3(self._stream)",
        "stream_handle is a typing.SupportsInt",
    ),
    Mutation(trt_engine, "refitter.refit_cuda_engine()", "refitter.refit_engine()", "Refitter has no refit_engine"),
    Mutation(
        trt_engine,
        "if self._settings.strip_weights:",
        "if False:",
        "a stripped plan was run before its weights were put in",
    ),
    Mutation(
        trt_engine,
        "self._addresses[past] = self._addresses[present] = memory.device(size)",
        "self._addresses[past], self._addresses[present] = memory.device(size), memory.device(size)",
        "present_key.0 and past_key.0 lie apart",
    ),
    Mutation(trt_engine, "self._cuda.clear(self._addresses[past], size, self._stream)", "pass", GIVES_OTHERS),
    Mutation(
        trt_engine,
        "self._cuda.synchronize(self._stream)\n        self.num_syncs += 1",
        "self.num_syncs += 1",
        "gave next_ids [[-1]] and num_accepted [-1]",
        PlanError,
    ),
    Mutation(
        trt_engine,
        'count * INT64, "to device"',
        'count * 4, "to device"',
        "write_indices[0] = -4294967296 is negative",
        Fail,
    ),
    Mutation(
        trt_engine,
        '"n": shape.block_size',
        '"n": self.block_sizes[-1]',
        "the plan does not take input_ids of shape [1, 8]",
        PlanError,
    ),
    Mutation(
        trt_engine,
        "self._owned = owned.pop_all()",
        "owned.pop_all(); self._owned = owned",
        "something was left on the device",
        AssertionError,
    ),
    Mutation(
        cuda,
        "getattr(self.runtime.cudaMemcpyKind, _KINDS[direction])",
        "1",
        "cudaMemcpyAsync: kind is a cudaMemcpyKind",
    ),
    Mutation(
        cuda,
        "cudaStreamCaptureModeThreadLocal",
        "cudaStreamCaptureThreadLocal",
        "cudaStreamCaptureThreadLocal",
        AttributeError,
    ),
    Mutation(
        cuda,
        'self._call("cudaGraphInstantiate", graph, 0)',
        'self._call("cudaGraphInstantiate", graph)',
        "cudaGraphInstantiate: misses 'flags'",
    ),
    Mutation(
        cuda,
        '"cudaMemsetAsync", address, 0, size, stream',
        '"cudaMemsetAsync", address, size, stream',
        "cudaMemsetAsync: misses 'stream'",
    ),
    Mutation(cuda, 'self._call("cudaFree", address)', "pass", "something was left on the device", AssertionError),
]


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path_factory.mktemp("mutations") / "bundle")


def run(bundle: Bundle) -> list[Any]:
    """What a plan with every option set gives, built and run by the modules as they are now."""
    simulated = SimulatedGpu()
    build, options = sys.modules[plan_module.__name__], sys.modules[plan_module.__name__].PlanOptions
    asked = options(
        block_sizes=(1, 8),
        prefill_chunk=16,
        kv_lengths=(32, 64),
        workspace=1 << 20,
        strip_weights=True,
        weight_streaming=True,
        version_compatible=True,
        hardware="ampere+",
        logits=False,
    )
    checked = simulated.gpu.__class__(
        tensorrt=simulated.trt, cuda=sys.modules[cuda.__name__].Cuda(simulated.runtime), facts=simulated.gpu.facts
    )
    built = build.build_plan(bundle, asked, gpu=checked, force=True)
    given = []
    with sys.modules[trt_engine.__name__].TrtEngine(bundle, plan=built, gpu=checked) as engine:
        for start in (0, 11):
            engine.prefill(Batch([[*range(2, 13)]], [11], [start]))
        for start, size in ((22, 8), (22, 8), (23, 1), (40, 8)):
            given.append(engine.forward(Batch([[*range(size)]], [1], [start])))
        reader = simulated.trt.make("OnnxParser")
        given.append(sys.modules[trt_graph.__name__].errors_of(reader))
    assert simulated.cuda.is_empty(), "something was left on the device"
    return given


@pytest.fixture
def restored() -> Iterator[None]:
    """Every module as it was: the very classes, which others have imported and ask after."""
    before = {module: dict(vars(module)) for module in (cuda, trt_graph, trt_engine, plan_module)}
    yield
    for module, content in before.items():
        vars(module).clear()
        vars(module).update(content)


def apply(mutation: Mutation) -> None:
    """Run the module's source anew with the mistake in it, then what imports names from it."""
    order = [cuda, trt_graph, trt_engine, plan_module]
    path = Path(str(mutation.module.__file__))
    source = path.read_text(encoding="utf-8")
    assert mutation.right in source, f"{path.name} no longer holds {mutation.right!r}: this mutation tests nothing"
    exec(compile(source.replace(mutation.right, mutation.wrong), str(path), "exec"), vars(mutation.module))
    for module in order[order.index(mutation.module) + 1 :]:
        importlib.reload(module)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[Any]:
    """What comes without a mistake."""
    return run(bundle)


def test_without_a_mistake_nothing_fails(bundle: Bundle, expected: list[Any], restored: None):
    assert run(bundle) == expected


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.wrong[:60] for mutation in MUTATIONS])
def test_a_mistake_is_found(bundle: Bundle, expected: list[Any], restored: None, mutation: Mutation):
    """By its own error, or by what the forwards give: an error of another kind tells nothing of the doubles."""
    apply(mutation)
    if mutation.phrase == GIVES_OTHERS:
        assert run(bundle) != expected, "the mistake went unseen"
        return
    with pytest.raises(mutation.error, match=re.escape(mutation.phrase)):
        run(bundle)
