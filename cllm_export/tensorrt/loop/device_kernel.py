"""A kernel of ours on the device: compiled by NVRTC when it is made, loaded and launched by the driver.

What a device takes is known only where it runs, so that no machine code is shipped. It knows nothing of loops or of
TensorRT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from cllm_export.errors import EngineError, MissingExtraError

Compiler = tuple[Any, Any]
"""``nvrtc`` and ``driver`` of cuda-python."""


def import_compiler() -> Compiler:
    """(``nvrtc``, ``driver``) of cuda-python.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        raise MissingExtraError("cuda-python", extra="tensorrt") from None
    return nvrtc, driver


def compile_kernel(nvrtc: Any, source: bytes, compute_capability: str) -> bytes:
    """A kernel's machine code for devices of a compute capability.

    Raises:
        EngineError: NVRTC does not compile it; its own words follow.
    """
    program = _checked(nvrtc, "nvrtcCreateProgram", source, b"loop.cu", 0, [], [])
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


class DeviceKernel:
    """A kernel that can be launched until the stack that owns it unwinds.

    Args:
        compiler: ``nvrtc`` and ``driver`` of cuda-python.
        source: CUDA C++ that needs no header, with one ``extern "C"`` kernel.
        name: the kernel's.
        kinds: ctypes of its parameters, in order.
        compute_capability: of the device, as ``GpuFacts`` has it.
        owned: unloads the kernel.

    Raises:
        EngineError: it does not compile or load.
    """

    def __init__(
        self,
        compiler: Compiler,
        *,
        source: bytes,
        name: bytes,
        kinds: Sequence[Any],
        compute_capability: str,
        owned: contextlib.ExitStack,
    ) -> None:
        nvrtc, self._driver = compiler
        self._kinds = tuple(kinds)
        module = self._drive("cuModuleLoadData", compile_kernel(nvrtc, source, compute_capability))
        owned.callback(self._drive, "cuModuleUnload", module)
        self._function = self._drive("cuModuleGetFunction", module, name)

    def launch(self, stream: Any, values: Sequence[int], *, blocks: int = 1, threads: int = 1) -> None:
        """Enqueue it over a line of blocks; addresses and numbers as its parameters have them."""
        arguments = (tuple(values), self._kinds)
        self._drive("cuLaunchKernel", self._function, blocks, 1, 1, threads, 1, 1, 0, int(stream), arguments, 0)

    def _drive(self, name: str, *arguments: Any) -> Any:
        """A call of the driver, checked."""
        code, *values = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed: {code!r}")
        return values[0] if values else None


def _checked(nvrtc: Any, name: str, *arguments: Any) -> Any:
    code, *values = getattr(nvrtc, name)(*arguments)
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"{name} failed: {code!r}")
    return values[0] if values else None
