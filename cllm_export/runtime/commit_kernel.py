"""What sliding Jacobi decoding does between two forwards, as a CUDA kernel: accept, emit, cut, make the next block.

The rules are those of ``SlidingJacobi`` and ``Decode`` in ``docs/loop.md``, for one slot a thread. Plain C but for two
words, so that tests compile the very same source for the CPU. Compiled by NVRTC when a loop is made, since what a
device takes is known only there.
"""

from __future__ import annotations

from typing import Any

from cllm_export.errors import EngineError, MissingExtraError

NAME = b"commit_blocks"
REPEAT = -1
"""As the fill: the token before the fill, repeated. Else the token itself."""

SOURCE = b"""
extern "C" __global__ void commit_blocks(
    const long long *next_ids, const long long *num_accepted,
    long long *input_ids, long long *num_committed, long long *write_index,
    int *left, int *emitted, int *ring, const int *eos,
    int num_eos, int n, int ring_size, int fill, int num_slots)
{
    int slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= num_slots || left[slot] == 0)
        return;
    const long long *next = next_ids + (long long)slot * n;
    long long *block = input_ids + (long long)slot * n;
    int accepted = (int)num_accepted[slot];
    int ended = 0;
    for (int row = 0; row < accepted && left[slot] > 0 && !ended; row++) {
        int token = (int)next[row];
        ring[(long long)slot * ring_size + emitted[slot] % ring_size] = token;
        emitted[slot]++;
        left[slot]--;
        for (int index = 0; index < num_eos; index++)
            ended |= token == eos[index];
    }
    if (ended)
        left[slot] = 0;
    if (left[slot] == 0) {          /* idle from now on: such a slot accepts nothing and stays where it is */
        num_committed[slot] = 0;
        return;
    }
    write_index[slot] += accepted;
    long long filler = fill < 0 ? next[n - 1] : fill;
    for (int row = 0; row < n; row++)
        block[row] = accepted - 1 + row < n ? next[accepted - 1 + row] : filler;
}
"""


def import_compiler() -> tuple[Any, Any]:
    """(``nvrtc``, ``driver``) of cuda-python.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        raise MissingExtraError("cuda-python", extra="tensorrt") from None
    return nvrtc, driver


def compile_kernel(nvrtc: Any, compute_capability: str) -> bytes:
    """The kernel's machine code for devices of a compute capability.

    Raises:
        EngineError: NVRTC does not compile it; its own words follow.
    """
    program = _checked(nvrtc, "nvrtcCreateProgram", SOURCE, b"commit_blocks.cu", 0, [], [])
    try:
        options = [b"--gpu-architecture=sm_" + compute_capability.replace(".", "").encode()]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            words = b" " * _checked(nvrtc, "nvrtcGetProgramLogSize", program)
            _checked(nvrtc, "nvrtcGetProgramLog", program, words)
            raise EngineError(f"NVRTC does not compile the loop's kernel: {words.decode(errors='replace')}")
        image = b" " * int(_checked(nvrtc, "nvrtcGetCUBINSize", program))
        _checked(nvrtc, "nvrtcGetCUBIN", program, image)  # written into the very bytes, as cuda-python has it
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, name: str, *arguments: Any) -> Any:
    code, *values = getattr(nvrtc, name)(*arguments)
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"{name} failed: {code!r}")
    return values[0] if values else None
