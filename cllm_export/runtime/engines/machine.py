"""The machine that forwards run on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError
from cllm_export.extras import missing_extra

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits."""

CPUINFO = Path("/proc/cpuinfo")

X86_FEATURES = ("sse", "ssse", "avx", "fma", "f16c", "amx")
ARM_FEATURES = ("asimd", "neon", "fphp", "sve", "smei", "smef", "sme2", "i8mm", "bf16")
"""How the names of instruction sets for arithmetic begin on x86, and on Arm."""


def available_threads() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_threads(threads: int | None) -> None:
    """Raise OptionError unless ``threads`` is None or at most what this process may use. More would only wait."""
    if threads is None:
        return
    require_at_least("threads", threads, 1)
    if threads > (there := available_threads()):
        raise OptionError(
            f"threads must be at most {there}, the number of processors that this process may use, got {threads}",
            fields=("threads",),
        )


def require_memory(num_slots: int, bytes_per_slot: int, *, free: int | None = None) -> None:
    """Refuse a KV cache that does not fit into the memory that is free, before it is allocated.

    Args:
        num_slots: B.
        bytes_per_slot: memory of one slot's KV cache.
        free: bytes that are free; by default those of this machine's main memory.

    Raises:
        OptionError: it does not fit. The message says what is needed and what is there.
    """
    needed, free = num_slots * bytes_per_slot, available_memory() if free is None else free
    if free is None or needed <= free:
        return
    fitting = free // bytes_per_slot
    advice = f"give at most num_slots={fitting}" if fitting else "build the bundle with a smaller max_length"
    raise OptionError(
        f"{num_slots} slots need {needed:,} bytes for the KV cache, {bytes_per_slot:,} each, and {free:,} bytes of "
        f"memory are free: {advice}",
        fields=("num_slots", "max_length"),
    )


def available_memory() -> int | None:
    """Bytes of memory that this process can have without swapping. None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    limits = [limit for limit in (free, _left_of_cgroup()) if limit is not None]
    return min(limits, default=None)


def total_memory() -> int:
    """Bytes of memory that this machine or its container has in all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((CGROUP / "memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is no limit
        return total


def _left_of_cgroup() -> int | None:
    """What a container's limit leaves, in bytes; None without a limit. Cached files count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return None if limit == "max" else max(0, int(limit) - used + cached)
    except (OSError, ValueError):
        return None


def describe_machine(threads: int | None, engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts that a measured figure depends on besides the bundle.

    Args:
        threads: CPU threads; None for as many as the process may use.
        engine: what ran the forwards, as ``Engine.describe`` says; by default ONNX Runtime on the CPU.
    """
    return {
        "processor": _processor(),
        "threads": threads or available_threads(),
        **(onnxruntime_version() if engine is None else engine),
        "python": platform.python_version(),
    }


def onnxruntime_version() -> dict[str, str]:
    """ONNX Runtime and its version, as ``describe`` of an engine names libraries.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", extra="cpu") from None
    return {"onnxruntime": onnxruntime.__version__}


def describe_processor(threads: int) -> dict[str, Any]:
    """What the bits of a forward on the CPU depend on, besides the library: processor, its features, and threads."""
    return {"device": _processor(), "features": processor_features(), "threads": threads}


def processor_features() -> list[str]:
    """The instruction sets that a library may choose its kernels by, sorted: ``avx512_vnni``, ``asimddp``.

    Where the system names none, it is the machine's architecture alone.
    """
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return [
        platform.machine(),
        *sorted({name for name in found.split() if name.startswith(X86_FEATURES + ARM_FEATURES)}),
    ]


def _processor() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
