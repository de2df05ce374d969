"""A loop that ends on the device, around ordinary kernels: no TensorRT, any CUDA device. Run by ``make test-gpu``.

The same tests run over the simulated GPU, where the kernels' own source is compiled for the CPU: that proves the tests
and the calls, not what a device does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_export.cuda import Cuda, open_cuda, probe_driver
from cllm_export.errors import WhileGraphError
from cllm_export.runtime.condition_kernel import SET_CONDITIONAL
from cllm_export.runtime.device_buffers import DeviceMemory, HostBuffer
from cllm_export.runtime.device_kernel import Compiler, DeviceKernel, import_compiler
from cllm_export.runtime.while_graph import WhileGraph

INT32 = 4
ADD = b"""
extern "C" __global__ void add(int *total, const int *step)
{
    total[0] += step[0];
}
"""
COUNT = (
    SET_CONDITIONAL
    + b"""
extern "C" __global__ void count(int *turns, int most, unsigned long long handle)
{
    turns[0]++;
    cudaGraphSetConditional(handle, turns[0] < most);
}
"""
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device with two kernels, one that works and one that says whether to go on, and three numbers."""

    cuda: Cuda
    stream: Any
    add: DeviceKernel
    count: DeviceKernel
    numbers: HostBuffer
    address: int

    def read(self) -> list[int]:
        """[total, step, turns]."""
        size = self.numbers.array.nbytes
        self.cuda.copy(self.numbers.address, self.address, size, "to host", self.stream)
        self.cuda.synchronize(self.stream)
        return self.numbers.array.tolist()

    def write(self, *numbers: int) -> None:
        self.numbers.array[:] = numbers
        self.cuda.copy(self.address, self.numbers.address, self.numbers.array.nbytes, "to device", self.stream)
        self.cuda.synchronize(self.stream)

    def body(self, most: int) -> Callable[[int], None]:
        """Adds the step to the total, until so many turns were taken."""
        total, step, turns = (self.address + INT32 * place for place in range(3))

        def enqueue(handle: int) -> None:
            self.add.launch(self.stream, (total, step))
            self.count.launch(self.stream, (turns, most, handle))

        return enqueue


def open_device(kind: str, directory: Path) -> tuple[Cuda, str, Compiler]:
    """CUDA, compute capability and compiler; skips the test, and says why, where this machine lacks them."""
    if kind == "simulated":
        from tests.tensorrt.simulation import SimulatedGpu

        simulated = SimulatedGpu()
        return simulated.gpu.cuda, simulated.gpu.facts.compute_capability, simulated.compiler(directory)
    if reason := probe_driver():
        pytest.skip(f"no GPU: {reason}")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-python is not installed: pip install 'cllm-export[tensorrt]'")
    cuda = open_cuda()
    return cuda, cuda.facts().compute_capability, import_compiler()


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    cuda, capability, compiler = open_device(request.param, tmp_path)
    pointer, number, handle = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulonglong
    with contextlib.ExitStack() as owned:
        stream = cuda.make_stream()
        owned.callback(cuda.destroy_stream, stream)
        memory = DeviceMemory(cuda, owned)
        options: dict[str, Any] = {"compute_capability": capability, "owned": owned}
        yield Device(
            cuda=cuda,
            stream=stream,
            add=DeviceKernel(compiler, source=ADD, name=b"add", kinds=(pointer, pointer), **options),
            count=DeviceKernel(compiler, source=COUNT, name=b"count", kinds=(pointer, number, handle), **options),
            numbers=memory.host(3, np.dtype(np.int32)),
            address=memory.device(3 * INT32),
        )


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_a_body_runs_until_its_last_kernel_says_so(device: Device, most: int):
    device.write(0, 7, 0)
    with contextlib.closing(WhileGraph(device.cuda, device.stream, device.body(most))) as graph:
        assert device.read() == [0, 7, 0], "recording runs nothing"
        graph.launch()
        assert device.read() == [7 * most, 7, most]


def test_a_graph_is_launched_again_from_what_lies_on_the_device(device: Device):
    with contextlib.closing(WhileGraph(device.cuda, device.stream, device.body(10))) as graph:
        for step in (1, 5):
            device.write(100, step, 0)
            graph.launch()
            assert device.read() == [100 + 10 * step, step, 10]
        graph.launch()  # the handle is 1 again, so that the body runs once before it is asked
        assert device.read() == [100 + 10 * 5 + 5, 5, 11]


def test_two_graphs_have_handles_of_their_own(device: Device):
    device.write(0, 1, 0)
    with (
        contextlib.closing(WhileGraph(device.cuda, device.stream, device.body(3))) as short,
        contextlib.closing(WhileGraph(device.cuda, device.stream, device.body(8))) as long,
    ):
        short.launch()
        long.launch()
        assert device.read() == [8, 1, 8]


def test_a_body_that_enqueues_nothing_is_refused(device: Device):
    with pytest.raises(WhileGraphError, match="enqueued nothing"):
        WhileGraph(device.cuda, device.stream, lambda handle: None)


def test_a_body_that_fails_leaves_the_stream_as_it_was(device: Device):
    def fail(handle: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        WhileGraph(device.cuda, device.stream, fail)
    device.write(1, 2, 3)
    assert device.read() == [1, 2, 3]
