"""A loop that ends on the device, around ordinary kernels: no TensorRT, any CUDA device. Run by ``make test-gpu``.

The same tests run over the simulated GPU, where the kernels' own source is compiled for the CPU: that proves the tests
and the calls, not what a device does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_export.errors import WhileGraphError
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.request import Decode, make_decoder
from cllm_export.runtime.engines.cuda import Cuda, open_cuda, probe_driver
from cllm_export.tensorrt.device_buffers import DeviceMemory, HostBuffer
from cllm_export.tensorrt.loop import commit_kernel
from cllm_export.tensorrt.loop.condition_kernel import SET_CONDITIONAL
from cllm_export.tensorrt.loop.device_kernel import Compiler, DeviceKernel, import_compiler
from cllm_export.tensorrt.loop.device_loop import follow
from cllm_export.tensorrt.loop.launch_copy import LaunchCopy
from cllm_export.tensorrt.loop.while_graph import WhileGraph

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
    memory: DeviceMemory
    owned: contextlib.ExitStack
    """Frees what a test makes here."""
    load: Callable[..., DeviceKernel]

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
        pytest.skip(f"cuda-python is not installed: {install_line('tensorrt')}")
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
            memory=memory,
            owned=owned,
            load=functools.partial(DeviceKernel, compiler, **options),
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


def test_what_a_launch_gave_is_read_while_the_next_one_may_run(device: Device):
    copies = [LaunchCopy(device.cuda, device.owned, {"numbers": (3, np.int32)}) for _ in range(2)]
    device.write(0, 7, 0)
    with contextlib.closing(WhileGraph(device.cuda, device.stream, device.body(1000))) as graph:
        for copy in copies:
            graph.launch()
            copy.enqueue({"numbers": device.address}, device.stream)
        copies[0].wait()
        assert copies[0]["numbers"].tolist() == [7000, 7, 1000]
        copies[1].wait()
        assert copies[1]["numbers"].tolist() == [7007, 7, 1001]


class CommitBuffers:
    """What the commit kernel reads and writes, on the device, with predictions that a test makes up."""

    slots, size, ring_size = 3, 4, 2
    ends = (1, 2)

    def __init__(self, device: Device, *, limit: int) -> None:
        self._device = device
        self._kernel = device.load(source=commit_kernel.SOURCE, name=commit_kernel.NAME, kinds=commit_kernel.KINDS)
        block = self.slots * self.size
        wide = {"next_ids": block, "num_accepted": self.slots, "input_ids": block, "num_committed": self.slots}
        narrow = {"left": self.slots, "turns": self.slots, "eos": len(self.ends)}
        narrow["ring"] = self.slots * self.ring_size * (1 + self.size)
        self._host = {name: device.memory.host(count, np.dtype(np.int64)) for name, count in wide.items()}
        self._host["write_index"] = device.memory.host(self.slots, np.dtype(np.int64))
        self._host |= {name: device.memory.host(count, np.dtype(np.int32)) for name, count in narrow.items()}
        self.addresses = {name: device.memory.device(host.array.nbytes) for name, host in self._host.items()}
        self.copy = LaunchCopy(
            device.cuda,
            device.owned,
            {name: (host.array.size, host.array.dtype.type) for name, host in self._host.items()},
        )
        self.write("num_committed", [1] * self.slots)
        self.write("write_index", range(self.slots))
        self.write("left", [limit] * self.slots)
        self.write("turns", [0] * self.slots)
        self.write("eos", self.ends)

    def write(self, name: str, values: Any) -> None:
        host, device = self._host[name], self._device
        host.array[:] = list(values)
        device.cuda.copy(self.addresses[name], host.address, host.array.nbytes, "to device", device.stream)
        device.cuda.synchronize(device.stream)

    def commit(self, proposer: int) -> None:
        numbers = (len(self.ends), self.size, self.ring_size, proposer, self.slots)
        pointers = [self.addresses[name] for name in commit_kernel.POINTERS]
        self._kernel.launch(self._device.stream, (*pointers, *numbers), threads=32)
        self.copy.enqueue(self.addresses, self._device.stream)
        self.copy.wait()


@pytest.mark.parametrize("proposer", ["pad", "repeat"])
@pytest.mark.parametrize("limit", [1, 9, 40])
def test_the_commit_kernel_is_the_policy_of_the_loop_on_the_host(device: Device, proposer: str, limit: int):
    """Block, write index, ring and end of three slots, forward by forward, over predictions that were made up."""
    buffers, generator = CommitBuffers(device, limit=limit), random.Random(limit)
    decodes = [
        Decode(
            make_decoder("jacobi", [9] * (1 + slot), proposer=proposer, seed=0, pad_token_id=0),
            max_new_tokens=limit,
            eos_token_ids=buffers.ends,
        )
        for slot in range(buffers.slots)
    ]
    for _ in range(12):
        running = [not decode.is_finished for decode in decodes]
        read = [len(decode.records) for decode in decodes]
        buffers.write("next_ids", [generator.randrange(30) for _ in range(buffers.slots * buffers.size)])
        buffers.write("num_accepted", [generator.randint(1, buffers.size) if runs else 0 for runs in running])
        buffers.commit(0 if proposer == "pad" else commit_kernel.REPEAT)
        for slot, decode in enumerate(decodes):
            sizes = {"ring_size": buffers.ring_size, "block_size": buffers.size}
            follow(decode, buffers.copy.read_turns(slot, read[slot], **sizes), buffers.size)
            assert len(decode.records) == read[slot] + running[slot]
            goes_on = not decode.is_finished
            assert bool(buffers.copy["left"][slot]) == bool(buffers.copy["num_committed"][slot]) == goes_on
            if goes_on:
                block = buffers.copy["input_ids"].reshape(buffers.slots, -1)[slot].tolist()
                assert block == decode.next_block(buffers.size).tokens
                assert buffers.copy["write_index"][slot] == decode.write_index
