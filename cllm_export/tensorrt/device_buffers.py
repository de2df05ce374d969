"""Device memory and page-locked host memory, freed when their owner is closed."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cllm_export.runtime.engines.cuda import Cuda


class HostBuffer(NamedTuple):
    """Page-locked host memory and an array over it."""

    address: int
    array: NDArray[Any]


class DeviceMemory:
    """Allocates memory that is freed when the ``owned`` stack unwinds."""

    def __init__(self, cuda: Cuda, owned: contextlib.ExitStack) -> None:
        self._cuda = cuda
        self._owned = owned

    def device(self, size: int) -> int:
        address = self._cuda.allocate(size)
        self._owned.callback(self._cuda.free, address)
        return address

    def host(self, count: int, dtype: np.dtype[Any]) -> HostBuffer:
        """Page-locked host memory for ``count`` items."""
        size = count * dtype.itemsize
        address = self._cuda.allocate_host(size)
        self._owned.callback(self._cuda.free_host, address)
        content = (ctypes.c_uint8 * size).from_address(address)
        return HostBuffer(address, np.frombuffer(memoryview(content), dtype))
