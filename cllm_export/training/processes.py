"""The processes of one run: a single one, or those that ``accelerate launch`` or ``torchrun`` started.

All processes call the same collectives in the same order, so they must all make the same decisions. An error in one
process must end all of them, because a process that waits for a lost one never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, parse_flag_from_env

from cllm_export.errors import CllmExportError, TuningError

T = TypeVar("T")
EXIT_ERROR = 2
"""Exit status of a process that leaves it to the first process to report the error."""


def join_processes() -> PartialState:
    """Join the processes of this run; on the CPU if there is no accelerator.

    Without ``cpu``, accelerate treats each process without a GPU as a run of its own.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def max_over_ranks(value: float) -> float:
    """The largest of all processes' values."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    gathered: torch.Tensor = gather(torch.tensor([value], device=state.device))
    return float(gathered.max())


def broadcast_from_rank0(value: T) -> T:
    """The first process's value, in every process."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


@contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Turn the error for a lost process into ``TuningError``. Each torch.distributed backend raises its own error."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise TuningError(
            "another process of the run is gone, and says why if it could; what was saved is whole: go on with "
            "resume=True"
        ) from error


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If one process raises in the block, end all processes at the end of the block, where they wait for each other.

    The first process raises the error, whichever process it came from. The others exit, so the error is reported once.
    Within the block, no collective may follow code that may raise.
    """
    error: CllmExportError | None = None
    try:
        yield
    except CllmExportError as raised:
        error = raised
    _raise_together(error)


def rank0_first(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process, then in the others, which find on disk what the first wrote."""
    is_main = PartialState().is_main_process
    made: list[T] = []
    for turn in (True, False):
        with raise_on_all_ranks():
            if is_main is turn:
                made.append(make())
    return made[0]


def _raise_together(error: CllmExportError | None) -> None:
    state = PartialState()
    if state.num_processes > 1:
        messages: list[str] = gather_object([str(error) if error else ""])
        if not any(messages):
            return
        if not state.is_main_process:
            raise SystemExit(EXIT_ERROR)
        error = error or TuningError(next(filter(None, messages)))
    if error:
        raise error
