"""Every error the project raises on purpose.

    CllmExportError
    ├── OptionError               an option or argument outside its range
    │   └── GrammarError          a grammar that does not compile, matches no text, or leads a text to a dead end
    ├── CheckpointError           a checkpoint that is missing, partial or damaged
    │   └── UnsupportedError      a sound checkpoint that the graph cannot express yet
    ├── GraphError                an exported graph that breaks one of its rules
    │   └── QuantizationError     a quantised graph that does not compute its model any more
    ├── OutputError               a target that exists, or cannot be written
    ├── BundleError               a bundle that is missing, partial or damaged
    │   ├── BundleVersionError    written by another schema or contract version
    │   └── ChecksumError         a file that differs from its manifest
    ├── SnapshotError             a snapshot of a prompt's state that is missing, damaged or of another bundle
    ├── PromptError               a prompt that is empty, too long or malformed
    ├── DataError                 a data file of a task that is missing, damaged or of another task
    ├── TuningError               a tuning run that cannot start, go on or be resumed
    ├── CalibrationError          a calibration that cannot start, go on or be resumed
    │   ├── DamagedRunError       a file of an interrupted calibration that is damaged
    │   └── ScalesError           a scales file that is missing, damaged or of another model
    ├── TrajectoryError           a collection of trajectories that is missing, damaged or of another model
    ├── EngineError               an engine that failed, or was asked for the impossible
    │   └── WhileGraphError       a loop that CUDA cannot run as a WHILE node
    ├── GpuError                  a GPU, its driver or a library for it that is missing or too old
    ├── PlanError                 a TensorRT plan that is missing, damaged, cannot be built or was built for elsewhere
    ├── QueueFullError            a service that takes no more requests for now
    ├── MissingExtraError         a command that needs an extra that is not installed
    └── OutdatedPackageError      an installed package that is older than this project needs

The command line prints the message of any of these errors and exits with 2. A message says what was wrong, which value
was given, and what to do next. Any other exception that escapes is a defect of this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CllmExportError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        fields: the options that the message names, as Python spells them. The command line shows their flags instead.
            A name that has an underscore, or a value as in ``name=value``, need not be listed.
        about: the option whose value is at fault, if the message does not name it. The command line puts its flag
            before the message.
    """

    about: str | None = None

    def __init__(self, message: str = "", *, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Let errors say that they are about the value of this option."""
    try:
        yield
    except CllmExportError as error:
        error.about = error.about or name
        raise


class OptionError(CllmExportError, ValueError):
    """An option or argument is outside its range."""


class GrammarError(OptionError):
    """A grammar does not compile, no text matches it, or it leads the text of a request to a dead end."""


class CheckpointError(CllmExportError):
    """A checkpoint is missing, partial or damaged."""


class UnsupportedError(CheckpointError):
    """A checkpoint is sound, but the graph cannot express its architecture yet."""


class GraphError(CllmExportError):
    """An exported graph breaks a rule it must hold."""


class QuantizationError(GraphError):
    """A model cannot be quantised as asked, or the quantised graph no longer computes the model."""


class OutputError(CllmExportError):
    """An output exists already, or cannot be written."""


class BundleError(CllmExportError):
    """A bundle is missing, partial or damaged."""


class BundleVersionError(BundleError):
    """A bundle was written by another version of the schema or the graph contract."""


class ChecksumError(BundleError):
    """A file of a bundle differs from what its manifest says."""


class SnapshotError(CllmExportError):
    """A snapshot of a prompt's state is missing, damaged, of another bundle or of another version."""


class PromptError(CllmExportError, ValueError):
    """A prompt is empty, too long or malformed."""


class DataError(CllmExportError):
    """A data file of a task is missing, damaged or of another task."""


class TuningError(CllmExportError):
    """A tuning run cannot start, go on or be resumed."""


class CalibrationError(CllmExportError):
    """A calibration cannot start, go on or be resumed, or its observations are unusable."""


class DamagedRunError(CalibrationError):
    """A file of an interrupted calibration is damaged."""


class ScalesError(CalibrationError):
    """A scales file is missing, damaged, or of another model or bundle."""


class TrajectoryError(CllmExportError):
    """A collection of trajectories is missing, incomplete, damaged, or of another model or tokenizer."""


class EngineError(CllmExportError, RuntimeError):
    """An engine failed, or was asked for a forward it cannot run."""


class WhileGraphError(EngineError):
    """This CUDA has no WHILE nodes, or the body holds what a WHILE body may not hold. The loop must be unrolled."""


class GpuError(CllmExportError):
    """A GPU, its driver or a library that runs on it is missing or too old."""


class PlanError(CllmExportError):
    """A TensorRT plan is missing or damaged, could not be built, or was built for another bundle or machine."""


class QueueFullError(CllmExportError):
    """The queue is full, so the request was not queued. Try again later, or send the request elsewhere."""

    def __init__(self, queue_size: int) -> None:
        super().__init__(
            f"the queue is full: {queue_size} requests wait already, which is its size; try again later, send the "
            "request to another instance, or make the queue larger"
        )


class MissingExtraError(CllmExportError, ImportError):
    """A package is missing that only an extra installs. The message ends with the line that installs it."""


class OutdatedPackageError(CllmExportError, ImportError):
    """A package is installed, but older than the oldest version that this project works with."""

    def __init__(self, package: str, *, installed: str, floor: str) -> None:
        super().__init__(
            f"this needs {package} {floor} or newer, and {installed} is installed; "
            f"upgrade it with: pip install --upgrade '{package}>={floor}'"
        )
