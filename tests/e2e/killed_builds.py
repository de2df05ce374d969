"""Builds that are killed at random moments: a program of its own, because it forks after the imports.

    python -m tests.e2e.killed_builds CHECKPOINT OLD_BUNDLE DIRECTORY SEED KILLS_PER_PHASE KILLS_IN_THE_TRACE

The trace takes most of a build, so the later phases are reached from one process that has traced: each trial is a
fork of it that goes on with the rest of the build. After each kill the target must be one whole bundle, or nothing
where there was none, and a build that is not killed must leave its bundle alone in its directory. Prints the kills
in each phase.
"""

from __future__ import annotations

import functools
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cllm_export.bundle.linked_weights import WEIGHTS_MODES, WeightsMode
from cllm_export.bundle.manifest import open_bundle
from cllm_export.bundle.storage import staged_output

if TYPE_CHECKING:
    from cllm_export.exporter.options import BuildOptions

PHASES = ("checkpoint", "trace", "weights", "bundle", "exchange")
BEFORE_STAGING = PHASES[:2]
DONE = "done"
TRIALS_PER_KILL = 20
"""A kill may come too late for the phase it was meant for; so many trials for one kill say that it cannot be hit."""


class _Finished(BaseException):
    """Ends the build from which the trials were forked."""


class _GoOn(BaseException):
    """Leaves the trials in a fork, which goes on with the build."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self.phases = phases


class Phases:
    """Tells, through a pipe, each phase that a build enters. A build that is to be killed in one waits there once."""

    def __init__(self, writing: int, permission: int, awaited: str | None) -> None:
        self._writing = writing
        self._permission = permission
        self._awaited = awaited
        self._entered = ""

    def enter(self, phase: str) -> None:
        if phase not in (*PHASES, DONE) or phase == self._entered:
            return
        self._entered = phase
        os.write(self._writing, f"{phase}\n".encode())
        if phase == self._awaited:
            os.read(self._permission, 1)

    @contextmanager
    def staged(self, target: Path, *, force: bool, marker: str) -> Iterator[Path]:
        """``staged_output``, within the phases that it begins."""
        self.enter("weights")
        with staged_output(target, force=force, marker=marker) as staging:
            yield staging
            self.enter("exchange")


Work = Callable[[Phases], NoReturn]
"""What a fork does: it exits, or raises ``_GoOn``."""


class Trial:
    """A build in a process of its own, and what it tells."""

    def __init__(self, work: Work, awaited: str | None = None) -> None:
        self._reading, writing = os.pipe()
        permission, self._permit = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reading)
            os.close(self._permit)
            work(Phases(writing, permission, awaited))
            raise AssertionError("a trial came back")
        os.close(writing)
        os.close(permission)
        self._told = ""

    def wait_for(self, phase: str) -> None:
        while phase not in self.phases:
            assert self._read(), f"the build ended before {phase}: {self.phases}"

    @property
    def phases(self) -> list[str]:
        return self._told.split()

    def kill(self, delay: float) -> str | None:
        """Let it go on, kill it, and say in which phase it died; None if it ended before."""
        os.write(self._permit, b"!")
        time.sleep(delay)
        os.kill(self.pid, signal.SIGKILL)
        return None if self.finish() == 0 else self.phases[-1]

    def go(self) -> dict[str, float]:
        """Let it build to its end, and say how long each phase took."""
        begun: dict[str, float] = {}
        while self._read():
            begun.setdefault(self.phases[-1], time.monotonic())
        assert self.finish() == 0
        ends = [*list(begun.values())[1:], time.monotonic()]
        return {phase: end - start for (phase, start), end in zip(begun.items(), ends, strict=True)}

    def finish(self) -> int:
        """0 if it ended by itself; a build that failed, or was killed by anything else, fails the test."""
        while self._read():
            pass
        os.close(self._reading)
        os.close(self._permit)
        status = os.waitpid(self.pid, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status), f"the build failed: {status}"
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"the build crashed: {status}"
        return status

    def _read(self) -> bool:
        assert select.select([self._reading], [], [], 240)[0], f"the build hangs: {self.phases}"
        part = os.read(self._reading, 4096)
        self._told += part.decode()
        return bool(part)


class Place:
    """A directory in which one target is built, again and again: over an old bundle, or where there is none."""

    def __init__(self, directory: Path, old: Path | None, new: str) -> None:
        self.target = directory / "bundle"
        self._old = old
        self._wanted = {new, *([open_bundle(old).fingerprint] if old else [])}
        self._new = new

    @property
    def force(self) -> bool:
        """Whether a build needs ``--force``: the one after a kill may find the new bundle where there was none."""
        return self._old is not None or self.target.exists()

    def reset(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if self._old:
            shutil.copytree(self._old, self.target)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.target.parent.iterdir())

    def check_killed(self, phase: str) -> str:
        """What stands there now; it must be whole, and nothing beside it look like a bundle."""
        strays = [name for name in self.names() if name != self.target.name]
        assert all(name.startswith(".bundle.") for name in strays), strays
        assert phase not in BEFORE_STAGING or not strays, strays
        if self._old is None and not self.target.exists():
            return "none"
        bundle = open_bundle(self.target)
        bundle.check_files()
        assert bundle.fingerprint in self._wanted, bundle.fingerprint
        return "new" if bundle.fingerprint == self._new else "old"

    def check_built(self) -> None:
        bundle = open_bundle(self.target)
        bundle.check_files()
        assert bundle.fingerprint == self._new
        assert self.names() == [self.target.name], self.names()


class Killer:
    """Kills builds in every phase, each at a random moment of it, and counts."""

    def __init__(self, place: Place, chance: random.Random) -> None:
        self._place = place
        self._chance = chance
        self.kills: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def kill(self, work: Work, phases: tuple[str, ...], wanted: int) -> None:
        """Kill until ``wanted`` builds died in each of the phases."""
        self._place.reset()
        took = Trial(work).go()
        self._place.check_built()
        for phase in phases:
            before = self.kills[phase]
            for _ in range(TRIALS_PER_KILL * wanted):
                if self.kills[phase] - before < wanted:
                    self._once(work, phase, took[phase])
            assert self.kills[phase] - before >= wanted, f"{phase} was hit {self.kills[phase] - before} times only"

    def _once(self, work: Work, phase: str, duration: float) -> None:
        self._place.reset()
        trial = Trial(work, phase)
        trial.wait_for(phase)
        died_in = trial.kill(self._chance.uniform(0, duration))
        if died_in in (None, DONE):
            self._place.check_built()
            return
        self.left[self._place.check_killed(died_in)] += 1
        self.kills[died_in] += 1
        if died_in not in BEFORE_STAGING:  # nothing was written before, and the next trial begins there
            Trial(work).go()
            self._place.check_built()


def main() -> None:
    checkpoint, old, directory = map(Path, sys.argv[1:4])
    seed, wanted, wanted_in_trace = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    import torch
    from tqdm import tqdm

    from cllm_export.exporter import pipeline

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread that a fork would lack
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it
    total: Counter[str] = Counter()
    left: Counter[str] = Counter()
    rounds: list[tuple[str, Path | None, WeightsMode]] = [
        ("fresh", None, "copy"),
        ("forced", old, "copy"),
        ("linked", old, "link"),
    ]
    built = {  # by which all that is imported late is imported before the first fork
        weights: pipeline.build(checkpoint, directory / f"new {weights}", pipeline.BuildOptions(weights=weights))
        for weights in WEIGHTS_MODES
    }
    for name, before, weights in rounds:
        options = pipeline.BuildOptions(weights=weights)
        place = Place(directory / name, before, built[weights].fingerprint)
        killer = Killer(place, random.Random(f"{seed} {name}"))
        whole = functools.partial(_build_whole, checkpoint, place, options)
        killer.kill(whole, ("trace",), wanted_in_trace)
        killer.kill(whole, ("checkpoint",), wanted)
        if weights == "link":  # the files are read in a thread beside the trace, which a fork after it would lack
            killer.kill(whole, PHASES[2:], wanted_in_trace)
        else:
            _kill_after_the_trace(killer, checkpoint, place, options, wanted)
        total += killer.kills
        left += killer.left
    sys.stdout.write(json.dumps({"kills": total, "left": left}) + "\n")


def _build_whole(checkpoint: Path, place: Place, options: BuildOptions, phases: Phases) -> NoReturn:
    from cllm_export.exporter import pipeline

    pipeline.staged_output = phases.staged
    with _exit_after(phases):
        pipeline.build(
            checkpoint, place.target, options, force=place.force, progress=lambda phase, *_: phases.enter(phase)
        )
    raise AssertionError("unreachable")


def _kill_after_the_trace(killer: Killer, checkpoint: Path, place: Place, options: BuildOptions, wanted: int) -> None:
    """Trace once in this process, and kill forks of it that go on from there."""
    from cllm_export.exporter import pipeline

    resumed: list[Phases] = []

    def staged_in_forks(target: Path, *, force: bool, marker: str) -> AbstractContextManager[Path]:
        try:
            killer.kill(_go_on, PHASES[2:], wanted)
        except _GoOn as fork:
            resumed.append(fork.phases)
            return fork.phases.staged(target, force=place.force, marker=marker)
        raise _Finished

    def report(phase: str, *_: int) -> None:
        for phases in resumed:
            phases.enter(phase)

    place.reset()
    pipeline.staged_output = staged_in_forks
    try:
        pipeline.build(checkpoint, place.target, options, force=place.force, progress=report)
    except _Finished:
        pipeline.staged_output = staged_output
        return
    except BaseException:
        if resumed:
            traceback.print_exc()
            os._exit(1)
        raise
    resumed[0].enter(DONE)
    os._exit(0)


def _go_on(phases: Phases) -> NoReturn:
    raise _GoOn(phases)


@contextmanager
def _exit_after(phases: Phases) -> Iterator[None]:
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    phases.enter(DONE)
    os._exit(0)


if __name__ == "__main__":
    main()
