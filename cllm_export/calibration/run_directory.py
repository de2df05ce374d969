"""The directory beside the scales file in which a calibration keeps finished work, so that it can be resumed.

    run.json               all settings that determine the outcome; a run with other settings cannot resume
    recordings-00000.jsonl the decodes of a fixed range of prompts
    statistics-00000.npz   statistics of the linear layers' inputs in that range
    gram-00000.npy         the Gram matrix of one input, over all ranges

A file appears whole or not at all. The directory is removed after the scales are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cllm_export.bundle.manifest import Loop, ProposerName
from cllm_export.bundle.storage import locked_directory, output_error, unfinished_files, whole_file, write_json
from cllm_export.errors import CalibrationError, DamagedRunError, OptionError, OutputError

RUN_NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings that determine the outcome of a calibration."""

    bundle_fingerprint: str
    prompts_sha256: str
    num_prompts: int
    loop: Loop
    proposer: ProposerName
    block_size: int
    max_new_tokens: int
    seed: int
    mix: float
    num_rows: int
    gram: bool
    threads: int
    """The order of sums may depend on the number of threads."""
    onnxruntime: str


class RunDirectory:
    """The files of one calibration."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def recordings(self, shard: int) -> Path:
        return self._path / f"recordings-{shard:05}.jsonl"

    def statistics(self, shard: int) -> Path:
        return self._path / f"statistics-{shard:05}.npz"

    def gram(self, index: int) -> Path:
        return self._path / f"gram-{index:05}.npy"

    def describe(self) -> str:
        """What an interruption leaves, and how to go on."""
        counts = {name: len(list(self._path.glob(f"{name}-*"))) for name in ("recordings", "statistics", "gram")}
        held = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no finished part yet"
        return f"{self._path} keeps what was done ({held}): run the same command again to go on"

    def make(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write one of the directory's files whole, unless it exists."""
        if path.exists():
            return
        try:
            with whole_file(path) as unfinished:
                write(unfinished)
        except OSError as error:
            raise output_error(error, path) from error


@contextmanager
def run_directory(output: Path, settings: RunSettings) -> Iterator[RunDirectory]:
    """The directory of a calibration that writes to ``output``: a new one, or that of an interrupted equal run.

    The directory is removed when the block ends, or fails for a permanent reason. It is kept if a retry may succeed.

    Raises:
        CalibrationError: the directory belongs to another run; the message says what differs.
        OutputError: another run is using the directory, or it cannot be written.
    """
    path = output.with_name(f"{output.name}.calibrating")
    busy = f"another calibration is at work in {path}: wait for it, or choose another output"
    with locked_directory(path, busy=busy):
        _begin(path, settings)
        try:
            yield RunDirectory(path)
        except DamagedRunError:
            raise
        except (CalibrationError, OptionError):  # a retry would fail again, so there is nothing to resume
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def _begin(path: Path, settings: RunSettings) -> None:
    run, ours = path / RUN_NAME, asdict(settings)
    if not run.exists():
        _refuse_strangers(path)
        write_json(run, ours)
        return
    try:
        theirs = dict(json.loads(run.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedRunError(f"{run} is damaged: {error}; remove {path} and calibrate again") from None
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise CalibrationError(
                f"{path} holds an interrupted calibration with {name} {theirs.get(name)!r}, this one has "
                f"{ours.get(name)!r}: choose another output, or remove the directory",
                fields=("output",),
            )


def _refuse_strangers(path: Path) -> None:
    ours = unfinished_files(path)
    if strange := sorted(entry.name for entry in path.iterdir() if entry not in ours):
        raise OutputError(
            f"{path} exists and holds {strange[0]}, which is not ours; choose another output", fields=("output",)
        )
