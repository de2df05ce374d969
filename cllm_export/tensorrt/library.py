"""Import of TensorRT's Python module, and its log, which is kept for error messages.

TensorRT is imported only after a driver was found: its libraries crash on a machine without one.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from cllm_export.errors import GpuError
from cllm_export.extras import missing_extra
from cllm_export.runtime.engines.cuda import ADVICE, Cuda, GpuFacts, open_cuda

OLDEST = (10, 15)
"""The first TensorRT version with KVCacheUpdate, which implements the graph's TensorScatter."""
KEPT_LINES, SHOWN_LINES = 64, 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU with its libraries. Plans are built with it, and engines run on it."""

    tensorrt: Any
    cuda: Cuda
    facts: GpuFacts
    compiler: tuple[Any, Any] | None = None
    """``nvrtc`` and ``driver`` of cuda-python. With None they are imported when the first kernel is compiled."""

    @property
    def version(self) -> str:
        """Version of TensorRT."""
        return str(self.tensorrt.__version__)


def open_gpu(device: int = 0) -> Gpu:
    """TensorRT and CUDA on a device of this machine.

    Raises:
        GpuError: there is no GPU, or TensorRT is too old or does not load.
        MissingExtraError: TensorRT or cuda-python is not installed.
    """
    cuda = open_cuda(device)
    return Gpu(tensorrt=import_tensorrt(), cuda=cuda, facts=cuda.facts(device))


def import_tensorrt() -> Any:
    """The module ``tensorrt``. Call this only on a machine with a GPU."""
    try:
        import tensorrt
    except ModuleNotFoundError:
        raise missing_extra("tensorrt", extra="tensorrt") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise GpuError(f"TensorRT is installed and does not load: {error}; {ADVICE}") from None
    require_version(str(tensorrt.__version__))
    return tensorrt


def require_version(version: str) -> None:
    """Check that this TensorRT version can run the graphs of a bundle.

    Raises:
        GpuError: it is older than the first version that can.
    """
    if version_numbers(version)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise GpuError(
            f"TensorRT {version} is too old: the graphs need {oldest} or newer; "
            f"install it with: pip install 'tensorrt>={oldest}'"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers in a version: (10, 15, 1, 29) for 10.15.1.29."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


class Log:
    """The last warnings and errors of TensorRT. Pass ``logger`` to its factories; it must outlive their objects."""

    def __init__(self, tensorrt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.logger = _make_logger(tensorrt, self._lines)

    def explain(self, message: str) -> str:
        """A message followed by TensorRT's last log lines. Each line is used in one message only."""
        lines = list(self._lines)[-SHOWN_LINES:]
        self._lines.clear()
        return message + ("; TensorRT says: " + " | ".join(lines) if lines else "; TensorRT says nothing of it")


def _make_logger(tensorrt: Any, lines: deque[str]) -> Any:
    severity = tensorrt.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        """TensorRT also calls this from its own threads. Appending to a deque is thread-safe."""

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                lines.append(" ".join(msg.split()))

    return Logger()
