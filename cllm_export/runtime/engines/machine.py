"""The machine that forwards run on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from cllm_export.extras import missing_extra


def available_threads() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int | None) -> dict[str, Any]:
    """The facts that a measured figure depends on besides the bundle."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", extra="cpu") from None
    return {
        "processor": _processor(),
        "threads": threads or available_threads(),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
