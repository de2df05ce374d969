"""CUDA kernel for sliding Jacobi decoding between two forwards: record, accept, cut, and make the next block.

The rules are those of ``SlidingJacobi`` and ``Decode`` in ``docs/loop.md``, with one thread per slot. First the kernel
writes the forward's outputs into an entry [1 + n] of the slot's ring: ``num_accepted``, then ``next_ids``. From it the
host later repeats every step of the kernel. The source is plain C except for two words, so tests compile it unchanged
for the CPU.
"""

from __future__ import annotations

import ctypes

NAME = b"commit_blocks"
REPEAT = -1
"""Value of ``proposed_token`` that fills unknown rows with the token before them. Other values are that token."""

POINTERS = (
    "next_ids",
    "num_accepted",
    "input_ids",
    "num_committed",
    "write_index",
    "left",
    "turns",
    "ring",
    "eos",
)
"""The kernel's buffers, in the order of its parameters. The first five are the engine's own."""
NUMBERS = ("num_eos", "n", "ring_size", "proposed_token", "num_slots")
KINDS = (ctypes.c_void_p,) * len(POINTERS) + (ctypes.c_int,) * len(NUMBERS)

SOURCE = b"""
extern "C" __global__ void commit_blocks(
    const long long *next_ids, const long long *num_accepted,
    long long *input_ids, long long *num_committed, long long *write_index,
    int *left, int *turns, int *ring, const int *eos,
    int num_eos, int n, int ring_size, int proposed_token, int num_slots)
{
    int slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= num_slots || left[slot] == 0)
        return;
    const long long *next = next_ids + (long long)slot * n;
    long long *block = input_ids + (long long)slot * n;
    int accepted = (int)num_accepted[slot];
    int *entry = ring + ((long long)slot * ring_size + turns[slot] % ring_size) * (1 + n);
    entry[0] = accepted;
    for (int row = 0; row < n; row++)
        entry[1 + row] = (int)next[row];
    turns[slot]++;
    int ended = 0;
    for (int row = 0; row < accepted && left[slot] > 0 && !ended; row++) {
        left[slot]--;
        for (int index = 0; index < num_eos; index++)
            ended |= (int)next[row] == eos[index];
    }
    if (ended)
        left[slot] = 0;
    if (left[slot] == 0) {          /* idle from now on: such a slot accepts nothing and stays where it is */
        num_committed[slot] = 0;
        return;
    }
    write_index[slot] += accepted;
    long long filler = proposed_token < 0 ? next[n - 1] : proposed_token;
    for (int row = 0; row < n; row++)
        block[row] = accepted - 1 + row < n ? next[accepted - 1 + row] : filler;
}
"""
