"""TensorRT's Python module where there is one, and its log kept for error messages.

Loaded only after the driver was probed: TensorRT's own libraries crash on a machine without one.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from cllm_export.errors import GpuError, MissingExtraError
from cllm_export.runtime.engines.cuda import ADVICE, Cuda, GpuFacts, open_cuda

OLDEST = (10, 15)
"""The first TensorRT with KVCacheUpdate, which the graph's TensorScatter becomes."""
KEPT_LINES, SHOWN_LINES = 64, 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and what drives it: what a plan is built with, and an engine runs on."""

    tensorrt: Any
    cuda: Cuda
    facts: GpuFacts
    compiler: tuple[Any, Any] | None = None
    """``nvrtc`` and ``driver`` of cuda-python; None imports them where a kernel is first made."""

    @property
    def version(self) -> str:
        """Of TensorRT."""
        return str(self.tensorrt.__version__)


def open_gpu(device: int = 0) -> Gpu:
    """TensorRT and CUDA on a device of this machine.

    Raises:
        GpuError: no GPU, or a TensorRT that is too old or does not load.
        MissingExtraError: TensorRT or cuda-python is not installed.
    """
    cuda = open_cuda(device)
    return Gpu(tensorrt=import_tensorrt(), cuda=cuda, facts=cuda.facts(device))


def import_tensorrt() -> Any:
    """The module ``tensorrt``; to be called on a machine with a GPU."""
    try:
        import tensorrt
    except ModuleNotFoundError:
        raise MissingExtraError("tensorrt", extra="tensorrt") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise GpuError(f"TensorRT is installed and does not load: {error}; {ADVICE}") from None
    require_version(str(tensorrt.__version__))
    return tensorrt


def require_version(version: str) -> None:
    """Check that this TensorRT can run our graphs.

    Raises:
        GpuError: it is older than the first that can.
    """
    if version_numbers(version)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise GpuError(
            f"TensorRT {version} is too old: the graphs need {oldest} or newer; "
            f"install it with: pip install 'tensorrt>={oldest}'"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """(10, 15, 1, 29) of 10.15.1.29."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


class Log:
    """The last warnings and errors of TensorRT. ``logger`` is what its factories take; it must outlive them."""

    def __init__(self, tensorrt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.logger = _make_logger(tensorrt, self._lines)

    def explain(self, message: str) -> str:
        """A message with TensorRT's own words behind it, and no line of them twice in a later one."""
        lines = list(self._lines)[-SHOWN_LINES:]
        self._lines.clear()
        return message + ("; TensorRT says: " + " | ".join(lines) if lines else "; TensorRT says nothing of it")


def _make_logger(tensorrt: Any, lines: deque[str]) -> Any:
    severity = tensorrt.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        """Called from TensorRT's own threads too; appending to a deque is safe there."""

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                lines.append(" ".join(msg.split()))

    return Logger()
