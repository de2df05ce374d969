"""Host copy of the results of one launch of the device loop: page-locked memory, and an event for its arrival.

Each launch in flight has its own copy, so the device fills one while the host reads the other.
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
    """The outputs of one forward for one slot. ``Forward`` has them for all slots."""

    next_ids: list[int]
    num_accepted: int


class LaunchCopy:
    """Copies of device buffers at the end of a launch.

    Args:
        cuda: CUDA on the device.
        owned: frees the memory and the event.
        sizes: number of items and dtype of each buffer, by name.
    """

    def __init__(self, cuda: Cuda, owned: contextlib.ExitStack, sizes: Mapping[str, tuple[int, type]]) -> None:
        self._cuda = cuda
        self._event = cuda.make_event()
        owned.callback(cuda.destroy_event, self._event)
        memory = DeviceMemory(cuda, owned)
        self._host = {name: memory.host(count, np.dtype(dtype)) for name, (count, dtype) in sizes.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The copy of a buffer. It is valid after ``wait``."""
        return self._host[name].array

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """Enqueue all copies behind the work that the stream has so far."""
        for name, host in self._host.items():
            self._cuda.copy(host.address, addresses[name], host.array.nbytes, "to host", stream)
        self._cuda.mark(self._event, stream)

    def wait(self) -> None:
        """Wait until the copies have arrived. Work that was enqueued behind them goes on."""
        self._cuda.wait_for(self._event)

    def read_turns(self, slot: int, first: int, *, ring_size: int, block_size: int) -> list[Turn]:
        """Outputs of the slot's forwards from number ``first`` on. At most as many as the ring holds are valid."""
        rings = self["ring"].reshape(-1, ring_size, 1 + block_size)
        places = range(first, int(self["turns"][slot]))
        entries = (rings[slot, place % ring_size].tolist() for place in places)
        return [Turn(next_ids, num_accepted) for num_accepted, *next_ids in entries]
