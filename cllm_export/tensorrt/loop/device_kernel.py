"""A custom CUDA kernel. NVRTC compiles it when it is made, and the driver loads and launches it.

No machine code is shipped, because the device is known only at run time. This module does not depend on loops or
TensorRT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from cllm_export.errors import EngineError
from cllm_export.extras import missing_extra

Compiler = tuple[Any, Any]
"""``nvrtc`` and ``driver`` of cuda-python."""


def import_compiler() -> Compiler:
    """The modules (``nvrtc``, ``driver``) of cuda-python.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        raise missing_extra("cuda-python", extra="tensorrt") from None
    return nvrtc, driver


def compile_kernel(nvrtc: Any, source: bytes, compute_capability: str) -> bytes:
    """A kernel's machine code for devices of a compute capability.

    Raises:
        EngineError: NVRTC does not compile it. The message contains NVRTC's log.
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
        _checked(nvrtc, "nvrtcGetCUBIN", program, image)  # cuda-python writes into these bytes in place
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class DeviceKernel:
    """A kernel that can be launched until the ``owned`` stack unwinds.

    Args:
        compiler: ``nvrtc`` and ``driver`` of cuda-python.
        source: CUDA C++ without includes, with one ``extern "C"`` kernel.
        name: name of the kernel.
        kinds: ctypes of its parameters, in order.
        compute_capability: that of the device, in the form of ``GpuFacts``.
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
        """Enqueue the kernel over a one-dimensional grid. ``values`` are addresses and numbers, one per parameter."""
        arguments = (tuple(values), self._kinds)
        self._drive("cuLaunchKernel", self._function, blocks, 1, 1, threads, 1, 1, 0, int(stream), arguments, 0)

    def _drive(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver, and check its error code."""
        code, *values = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{name} failed: {code!r}")
        return values[0] if values else None


def _checked(nvrtc: Any, name: str, *arguments: Any) -> Any:
    code, *values = getattr(nvrtc, name)(*arguments)
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"{name} failed: {code!r}")
    return values[0] if values else None
