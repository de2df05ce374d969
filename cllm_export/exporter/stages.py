"""Reports and times the stages of a build."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from cllm_export.progress import Progress

log = logging.getLogger(__name__)


class Stages:
    """Times each stage of a build and reports its seconds."""

    def __init__(self, say: Callable[[str], None], progress: Progress) -> None:
        self.say = say
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 1)
        started = perf_counter()
        yield
        self.took(name, perf_counter() - started)

    def took(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 3)
        self.say(f"{name:<12}{seconds:8.2f} s")
