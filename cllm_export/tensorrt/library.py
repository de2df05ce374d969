"""The two TensorRT libraries: what each can do, its Python module, and its log.

``tensorrt`` is the library for data-centre cards and Jetson. It builds a plan on the GPU that runs it. Its libraries
crash on a machine without a GPU, so it is imported only after a driver was found. ``tensorrt-rtx`` is TensorRT for RTX.
It parses and builds on any machine, for named generations of cards.
"""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cllm_export.checks import require_one_of
from cllm_export.errors import GpuError
from cllm_export.extras import missing_extra
from cllm_export.runtime.engines.cuda import ADVICE, Cuda, GpuFacts, open_cuda

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
LIBRARY_NAMES: tuple[LibraryName, ...] = get_args(LibraryName)

CARD_FORMATS = (("bf16", 80), ("int4", 80), ("fp8", 89))
KEPT_LINES, SHOWN_LINES = 64, 8
NOISE = re.compile(
    r"Make sure (input|output) \S+ has Int64 binding|The logger passed into \w+ differs|--- (Begin|End) node ---"
)
"""Messages that give no reason. All inputs and outputs of the contract that count something are int64, each build of a
process has a log of its own, and the parser's own error names the node."""
REPORT = re.compile(r"\A(Layers:|Total (Weights|Activation|Device Persistent) Memory:|Max Scratch Memory:)")
"""Log messages that describe the finished plan. ``plan_contents.py`` reads them."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """One of the two libraries: its names, its oldest version that will do, and what it can do."""

    name: LibraryName
    title: str
    module: str
    package: str
    """The package that pip installs."""
    extra: str
    oldest: tuple[int, int]
    targets: tuple[str, ...] = ()
    """Generations of cards that it builds for without a GPU. Empty if it builds for the GPU of this machine."""
    compiles_on_card: bool = False
    """Whether the card that runs a plan compiles its kernels when they run first."""
    flags: tuple[str, ...] = ()
    """Flags of the builder that each plan gets."""
    lacks: tuple[tuple[str, str], ...] = ()
    """Options of a plan that it cannot do, and the reason."""
    oldest_generation: tuple[tuple[str, int], ...] = CARD_FORMATS
    """Number formats that not every card has, and the first generation that has each: ten times its compute
    capability."""

    @property
    def oldest_text(self) -> str:
        return ".".join(map(str, self.oldest))

    def require_formats(self, subject: str, formats: Sequence[str], generations: Sequence[str]) -> None:
        """Refuse a number format that a generation of cards does not have, before a graph is parsed or exported.

        Args:
            subject: what has the formats, as the beginning of the message: "PATH is".
            formats: precision and scheme of a bundle.
            generations: compute capabilities as TensorRT names them, such as sm89.

        Raises:
            GpuError: a generation lacks one of the formats. The message names both.
        """
        oldest = dict(self.oldest_generation)
        for generation in generations:
            for name in formats:
                if int(generation.removeprefix("sm")) < oldest.get(name, 0):
                    raise GpuError(
                        f"{subject} a bundle with {name}, which {generation} does not have: build the bundle with "
                        f"precision='fp16', or for cards of sm{oldest[name]} or newer"
                    )

    def require_version(self, version: str) -> None:
        """Check that this version can run the graphs of a bundle.

        Raises:
            GpuError: it is older than the first version that can.
        """
        if version_numbers(version)[:2] < self.oldest:
            raise GpuError(
                f"{self.title} {version} is too old: the graphs need {self.oldest_text} or newer; "
                f"install it with: pip install '{self.package}>={self.oldest_text}'"
            )


TENSORRT = Library(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    package="tensorrt",
    extra="tensorrt",
    oldest=(10, 15),  # the first version with KVCacheUpdate, which implements the graph's TensorScatter
)
TENSORRT_RTX = Library(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx_bindings",
    package="tensorrt-rtx-cu13-bindings",
    extra="tensorrt-rtx",
    oldest=(1, 7),
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    compiles_on_card=True,
    oldest_generation=(*CARD_FORMATS, ("fp32", 80)),  # it multiplies no fp32 matrices on older cards
    flags=("REQUIRE_USER_ALLOCATION",),  # the build then fails if a forward could not be recorded as a CUDA graph
    lacks=(
        ("strip_weights", "its builder needs a GPU to strip weights"),
        ("version_compatible", "it ships no lean runtime, which such a plan needs"),
        ("hardware", "name the generations of cards with targets instead"),
    ),
)
LIBRARIES: dict[LibraryName, Library] = {each.name: each for each in (TENSORRT, TENSORRT_RTX)}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU with its libraries. Plans are built with it, and engines run on it."""

    tensorrt: Any
    """The Python module of ``library``."""
    cuda: Cuda
    facts: GpuFacts
    compiler: tuple[Any, Any] | None = None
    """``nvrtc`` and ``driver`` of cuda-python. With None they are imported when the first kernel is compiled."""
    library: Library = TENSORRT

    @property
    def version(self) -> str:
        """Version of TensorRT."""
        return str(self.tensorrt.__version__)


def open_gpu(library: Library = TENSORRT, *, device: int = 0) -> Gpu:
    """A TensorRT library and CUDA on a device of this machine.

    Raises:
        GpuError: there is no GPU, or the library is too old or does not load.
        MissingExtraError: the library or cuda-python is not installed.
    """
    cuda = open_cuda(device, extra=library.extra)
    return Gpu(tensorrt=import_library(library), cuda=cuda, facts=cuda.facts(device), library=library)


def import_library(library: Library) -> Any:
    """The Python module of a library. Import ``tensorrt`` only on a machine with a GPU.

    Raises:
        GpuError: the library is too old or does not load.
        MissingExtraError: it is not installed.
    """
    require_one_of("engine", library.name, LIBRARY_NAMES)
    try:
        module = importlib.import_module(library.module)
    except ModuleNotFoundError:
        raise missing_extra(library.package, extra=library.extra) from None
    except (ImportError, OSError, RuntimeError) as error:
        advice = f"; {ADVICE}" if not library.targets else ""
        raise GpuError(f"{library.title} is installed and does not load: {error}{advice}") from None
    library.require_version(str(module.__version__))
    return module


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers in a version: (10, 15, 1, 29) for 10.15.1.29."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


class Log:
    """The last warnings and errors of TensorRT. Pass ``logger`` to its factories; it must outlive their objects."""

    def __init__(self, tensorrt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.report: list[str] = []
        """The messages that describe the plan that was built last."""
        self.logger = _make_logger(tensorrt, self._lines, self.report)

    def explain(self, message: str) -> str:
        """A message followed by TensorRT's last log lines. Each line is used in one message only."""
        lines = list(self._lines)[-SHOWN_LINES:]
        self._lines.clear()
        return message + ("; TensorRT says: " + " | ".join(lines) if lines else "; TensorRT says nothing of it")


def _make_logger(tensorrt: Any, lines: deque[str], report: list[str]) -> Any:
    severity = tensorrt.ILogger.Severity
    kept = (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING)

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        """TensorRT also calls this from its own threads. Appending to a deque is thread-safe."""

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                if not NOISE.search(msg):
                    lines.append(" ".join(msg.split()))
            elif REPORT.match(msg):
                report.append(msg)

    return Logger()
