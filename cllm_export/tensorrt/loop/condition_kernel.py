"""Whether a loop on the device goes on after a forward, as a CUDA kernel: it sets the handle of the loop's WHILE node.

A kernel of its own, behind the commit: slots may be committed by several blocks, which do not wait for each other, and
a compiler or device without WHILE nodes still takes the commit. One thread reads two numbers a slot.
"""

from __future__ import annotations

import ctypes

NAME = b"repeat_or_end"
POINTERS = ("write_index", "left", "forwards")
NUMBERS = ("n", "kv_length", "most", "num_slots")
KINDS = (ctypes.c_void_p,) * len(POINTERS) + (ctypes.c_int,) * len(NUMBERS) + (ctypes.c_ulonglong,)
"""The last is the handle."""

SET_CONDITIONAL = b"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
"""
"""To be put before a kernel that sets a handle: NVRTC knows the function and does not declare it."""

SOURCE = (
    SET_CONDITIONAL
    + b"""
extern "C" __global__ void repeat_or_end(
    const long long *write_index, const int *left, int *forwards,
    int n, int KV length, int most, int num_slots, unsigned long long handle)
{
    int running = 0, fits = 1;
    for (int slot = 0; slot < num_slots; slot++) {
        if (left[slot] == 0)
            continue;
        running = 1;
        fits &= write_index[slot] + n <= KV length;    /* a row outside would be ignored in silence */
    }
    forwards[0]++;
    cudaGraphSetConditional(handle, running && fits && forwards[0] < most);
}
"""
)
