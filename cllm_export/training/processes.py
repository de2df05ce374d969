"""The processes of one run: this one alone, or those that ``accelerate launch`` or ``torchrun`` started.

They call the same collectives in the same order, so all must come to the same decisions, and an error of one must
end all: a process that waits for one that is gone never ends.
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
"""Of a process whose error is another's to tell."""


def join_processes() -> PartialState:
    """This process among those of its run, on the CPU where there is nothing faster.

    accelerate takes processes without a GPU for runs of their own unless it is told.
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
    """Say so where another process is gone, which each back end of torch.distributed reports in its own way."""
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
    """What one process raises in the block, all raise at its end, which none passes before the others.

    The first process raises the error, whoever's it is; the others end, so that it is told once. A block must not
    hold collectives after what may raise.
    """
    error: CllmExportError | None = None
    try:
        yield
    except CllmExportError as raised:
        error = raised
    _raise_together(error)


def rank0_first(make: Callable[[], T]) -> T:
    """What ``make`` gives, called in the first process before the others, which find what it left on disk."""
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
