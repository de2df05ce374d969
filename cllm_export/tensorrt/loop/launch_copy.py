"""What comes to the host of a launch of a loop on the device: page-locked memory, and the event that says it has come.

Each launch that may be under way has one of its own, so that the device fills one while the host reads the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.runtime.engines.cuda import Cuda
from cllm_export.tensorrt.device_buffers import DeviceMemory


class Turn(NamedTuple):
    """What one forward gave one slot, as ``Forward`` has it for all."""

    next_ids: list[int]
    num_accepted: int


class LaunchCopy:
    """Buffers of the device as they were when a launch ended.

    Args:
        cuda: of the device.
        owned: frees memory and event.
        sizes: items of each buffer, and their dtype, by name.
    """

    def __init__(self, cuda: Cuda, owned: contextlib.ExitStack, sizes: Mapping[str, tuple[int, type]]) -> None:
        self._cuda = cuda
        self._event = cuda.make_event()
        owned.callback(cuda.destroy_event, self._event)
        memory = DeviceMemory(cuda, owned)
        self._host = {name: memory.host(count, np.dtype(dtype)) for name, (count, dtype) in sizes.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A buffer, after ``wait``."""
        return self._host[name].array

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """Have everything copied, behind what the stream was given so far."""
        for name, host in self._host.items():
            self._cuda.copy(host.address, addresses[name], host.array.nbytes, "to host", stream)
        self._cuda.mark(self._event, stream)

    def wait(self) -> None:
        """Wait until the copies are there; what was enqueued behind them goes on."""
        self._cuda.wait_for(self._event)

    def read_turns(self, slot: int, first: int, *, ring_size: int, block_size: int) -> list[Turn]:
        """What the slot's forwards gave from number ``first`` on, at most as many as the ring holds."""
        rings = self["ring"].reshape(-1, ring_size, 1 + block_size)
        places = range(first, int(self["turns"][slot]))
        entries = (rings[slot, place % ring_size].tolist() for place in places)
        return [Turn(next_ids, num_accepted) for num_accepted, *next_ids in entries]
