"""Processes for the tests of ``tune``: forked from one that has imported everything, killed at a chosen moment, limited
in what they may write, or one of several of a run."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.e2e.conftest import Outcome

TIMEOUT = 240
_SCRATCH = re.compile(r"\.cllm-export-[0-9a-f]{8}\.")
"""What a file's name begins with while it is written: another for each file."""
EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")
"""What Python reports, just before it does it, of all that a run does to files."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a process is to do."""

    arguments: Sequence[str]
    log: Path
    """Its streams go to ``LOG.out`` and ``LOG.err``."""
    watched: Path | None = None
    """Files below it are counted: every event before one of them is touched goes to ``LOG.events``, a line each."""
    kill_at: int | None = None
    """The number of the event to be killed before."""
    largest_file: int | None = None
    """Bytes that a file may have at most."""
    environment: Mapping[str, str] = field(default_factory=dict)
    accelerator: bool = False
    """Let accelerate take the CPUs for accelerators: it shards on those alone."""
    weights: Path | None = None
    """Where to leave the weights of this process's own model whenever it saves its state."""


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.e2e.tuning_preload"])


def start(orders: Orders) -> BaseProcess:
    process = _context.Process(target=_obey, args=(orders,), daemon=True)
    process.start()
    return process


def finish(process: BaseProcess, orders: Orders) -> Outcome:
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running: {orders.arguments}")
    out, err = (Path(f"{orders.log}.{name}").read_text() for name in ("out", "err"))
    return Outcome(process.exitcode, out, err)


def run(orders: Orders) -> Outcome:
    return finish(start(orders), orders)


def run_together(orders: Sequence[Orders]) -> list[Outcome]:
    """Several processes of one run, as a launcher starts them."""
    return [finish(*pair) for pair in [(start(entry), entry) for entry in orders]]


def _obey(orders: Orders) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{orders.log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(orders.environment)
    if orders.largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (orders.largest_file,) * 2)
    if orders.watched:
        _watch(orders)
    if orders.weights:
        _leave_weights(orders.weights)
    sys.argv = ["cllm-export", *orders.arguments]
    try:
        _run(orders)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(orders: Orders) -> None:
    from cllm_export.cli import main

    if orders.accelerator:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    main()


def _leave_weights(path: Path) -> None:
    import gc

    import torch

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and "state.new/pool_" in str(arguments[0]):
            (model,) = (found for found in gc.get_objects() if type(found).__name__ == "PackedModel")
            torch.save(model.state_dict(), path)

    sys.addaudithook(hook)


def _watch(orders: Orders) -> None:
    watched, seen = str(orders.watched), 0
    log = os.open(f"{orders.log}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not str(arguments[0]).startswith(watched):
            return
        if event == "open" and not _writes(arguments):
            return
        if seen == orders.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        name = _SCRATCH.sub(".cllm-export.", os.path.relpath(str(arguments[0]), watched))
        os.write(log, f"{event} {name}\n".encode())

    sys.addaudithook(hook)


def _writes(arguments: tuple[object, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
