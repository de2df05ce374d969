"""CUDA kernel that decides after a forward whether the device loop goes on. It sets the handle of the WHILE node.

It is a separate kernel, behind the commit kernel, for two reasons. Several CUDA blocks may commit slots, and they do
not wait for each other. And a compiler or device without WHILE nodes can still use the commit kernel. One thread reads
two numbers per slot.
"""

from __future__ import annotations

import ctypes

NAME = b"repeat_or_end"
POINTERS = ("write_index", "left", "forwards")
NUMBERS = ("n", "kv_length", "most", "num_slots")
KINDS = (ctypes.c_void_p,) * len(POINTERS) + (ctypes.c_int,) * len(NUMBERS) + (ctypes.c_ulonglong,)
"""ctypes of the kernel's parameters. The last one is the handle."""

SET_CONDITIONAL = b"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
"""
"""Declaration for kernels that set a handle. NVRTC knows this function but does not declare it."""

SOURCE = (
    SET_CONDITIONAL
    + b"""
extern "C" __global__ void repeat_or_end(
    const long long *write_index, const int *left, int *forwards,
    int n, int kv_length, int most, int num_slots, unsigned long long handle)
{
    int running = 0, fits = 1;
    for (int slot = 0; slot < num_slots; slot++) {
        if (left[slot] == 0)
            continue;
        running = 1;
        fits &= write_index[slot] + n <= kv_length;    /* a row outside would be ignored in silence */
    }
    forwards[0]++;
    cudaGraphSetConditional(handle, running && fits && forwards[0] < most);
}
"""
)
