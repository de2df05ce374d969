"""An unbuffered TensorBoard log. TensorBoard's own writer uses a thread, and nobody catches its errors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventLog:
    """One event file. Its directory holds one file for each start of a run.

    Raises:
        OSError: the file cannot be written; ``add`` raises it as well.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"events.out.tfevents.{time.time_ns()}.cllm-export").open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log={"status": "START"}))  # hides later steps of a killed run

    def add(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write one point for each value."""
        points = [Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
